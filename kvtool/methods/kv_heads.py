"""KV heads: `heads` neighbouring KV heads become one, of the same width, by the singular vectors of what they cached.

Yu et al., arXiv 2406.07056 ("Effectively Compress KV Heads for LLM"). There is no released code; abstract and a summary
were read, the rest is from memory.

    [k_1 … k_t] = U Σ Vᵀ over tokens;   V_D its first D right singular vectors, tD × D;   z = [k_1 … k_t]·V_D,
    k̂_i = z·V_D[i]ᵀ;   memory 16/t bits a number

Keys and values each have their own basis, keys before RoPE: query i would absorb V_D[i] if nothing stood between, but
RoPE does, so that latents are expanded and turned at their stored positions; for values the output absorbs it, once a
query. Mean pooling, which GQA conversions begin with, is the special case of V_D[i] = 1/t: it loses what differs
between heads by a rotation, which this does not. Departure: the published conversion changes the weights, and trains
LoRA adapters afterwards; here the weights stay, and nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool.errors import InputError
from kvtool.methods import _ranks
from kvtool.methods._base import Context, Decision
from kvtool.methods._training import whole
from kvtool.options import at_least

STATISTICS = ("gram",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """heads: neighbouring KV heads that become one; the next larger number that divides K. sink: first entries that
    stay raw. recent: newest entries that stay raw. block: entries that leave the raw window together."""

    heads: int = 2
    sink: int = 0
    recent: int = 0
    block: int = 32

    def __post_init__(self) -> None:
        at_least(1, self, "heads", "block")
        at_least(0, self, "sink", "recent")


def at(budget: float) -> dict[str, Any]:
    """One head of 1/budget; no model keeps less than one of all it has."""
    return {"heads": max(1, round(1 / budget))}


def calibrate(context: Context, options: Options) -> Decision:
    g, layers = context.geometry, whole(context.geometry)
    count = next((n for n in range(options.heads, g.kv_heads + 1) if g.kv_heads % n == 0), g.kv_heads)
    if g.kv_heads == 1 and options.heads > 1:
        raise InputError("one KV head cannot become fewer", got="a model with one", remedy="use palu or eigen")
    found = [_ranks.principal(gram[layers]) for gram in _ranks.moments(context.seen, g.kv_heads, count)]
    energy, bases = [each[0] for each in found], [each[1] for each in found]  # keys', values': [N,K/count,n,…]
    ranks = torch.full((len(layers), 2), g.head_dim)
    pairs = _ranks.projected(layers, bases, ranks, count)
    store = _ranks.store(g, pairs, sink=options.sink, recent=options.recent, block=options.block)
    dropped = [_ranks.left(each)[..., g.head_dim].float() for each in energy]  # [N,K/count]
    evidence = {"key_dropped": dropped[0], "value_dropped": dropped[1]}
    facts = {"heads": count, **_ranks.facts(energy, ranks, count * g.head_dim)}
    return Decision(store=store, evidence=evidence, facts=facts)
