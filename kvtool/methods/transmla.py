"""TransMLA: keys mixed across KV heads so that few components hold them, without leaving RoPE; and what a whole
conversion to latent attention would lose.

Meng et al., arXiv 2502.07864, NeurIPS 2025, with its released code (v3).

    per pair of channels: U over heads from Σ z z*, z_h = k_{h,a} + i k_{h,b} (RoRoPE);   keys: the strongest
    components, after RoPE;   values: z = v·U_r over all heads' channels;   memory 16·(r_k + r_v)/2C bits a number

The published conversion keeps RoPE on one head's width of such components (the rope head), takes it off the others,
divides those by the ratio of their mean norm to the values', and holds them and the values as one latent, the principal
one of [K_nope | V]. Attention then reads the latent as it is: the query absorbs its up-projection, since nothing turns.

What is built here is the half that needs no training: all components that are kept keep RoPE, which mixing across heads
does not disturb, so that the query meets what is stored and nothing is rebuilt; keys and values have a latent each. The
other half is measured, not stored: per layer, on texts, the relative change of the attention output if the rest
of the keys loses RoPE (`nope_error`), if besides the rest and the values go through one joint latent of as many numbers
a token as the plan holds (`converted_error`), and under the plan itself (`error`). For queries that were rotated when
they came, keys without RoPE would have to be met by queries with their rotation undone, and both sides of an entry
written as one: the cache has neither.

Ours: `phase` lets U be complex, which commutes with RoPE as well and never holds less; the budget is dealt to layers
and sides by the least sum of dropped shares. Not here: folding of neighbouring frequencies into one (freqfold,
collapse), which is inexact, and the healing by training that published numbers at short latents depend on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool.errors import InputError
from kvtool.methods import _ranks, _roped, _training
from kvtool.methods._base import Context, Decision
from kvtool.methods._prompts import texts
from kvtool.methods._roped import Mixed
from kvtool.options import at_least

STATISTICS = ("gram",)
MODEL = True


@dataclass(frozen=True)
class Options:
    """budget: share of the bytes of 16-bit keys and values that components and latents take. phase: heads are mixed
    with complex weights, or with one real matrix for both halves (published). samples, tokens: texts and their length
    that losses are measured on; samples=0 measures none. sink: first entries that stay raw. recent: newest entries that
    stay raw. block: entries that leave the raw window together."""

    budget: float = 0.5
    phase: bool = False
    samples: int = 1
    tokens: int = 256
    sink: int = 0
    recent: int = 0
    block: int = 32

    def __post_init__(self) -> None:
        at_least(1, self, "block")
        at_least(0, self, "sink", "recent", "samples")
        if not 0 < self.budget <= 1:
            raise InputError("bad option budget", got=self.budget, expected="a share, more than 0")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g, chosen = context.geometry, _training.whole(context.geometry)
    width = g.kv_heads * g.head_dim
    layers = [_layer(context, layer, options) for layer in chosen]
    steps, step = _ranks.units(options.budget, width, 2, 2 * len(layers))
    dealt = _ranks.greedy(torch.stack([layer.dropped for layer in layers]).flatten(0, 1), steps, step)
    ranks = step * dealt.reshape(-1, 2)
    bases = ([layer.keys[None] for layer in layers], [layer.values[None] for layer in layers])
    pairs = _ranks.projected(chosen, bases, ranks, g.kv_heads, rotated=True)
    store = _ranks.store(g, pairs, sink=options.sink, recent=options.recent, block=options.block)
    evidence = {"ranks": ranks.int(), "rope_share": torch.tensor([layer.rope_share for layer in layers])}
    evidence |= measured(context, options, layers, ranks) if options.samples else {}
    means = {name: float(each.mean()) for name, each in evidence.items() if name != "ranks"}
    sides = {f"{side}_rank": float(ranks[:, at].double().mean() / width) for at, side in enumerate(("key", "value"))}
    return Decision(store=store, evidence=evidence, facts={**sides, **means})


def _layer(context: Context, number: int, options: Options) -> Mixed:
    g, rotary = context.geometry, context.running.rotary(number)
    keys, values = (gram[number, 0] for gram in _ranks.moments(context.seen, g.kv_heads, g.kv_heads))
    energy, columns = _roped.components(keys, rotary, g.kv_heads, phase=options.phase)
    rope = _roped.leading(rotary, g.kv_heads, len(energy))
    order = energy.argsort(descending=True, stable=True)
    value_energy, basis = _ranks.principal(values)
    dropped = torch.stack([_ranks.left(energy[order].repeat_interleave(2) / 2), _ranks.left(value_energy)])
    share = float(energy[rope].sum() / energy.sum().clamp_min(1e-300))
    columns = columns.unflatten(1, (-1, 2))[:, order].flatten(1)
    return Mixed(columns, rope[order].repeat_interleave(2), share, basis, dropped)


def measured(context: Context, options: Options, layers: list[Mixed], ranks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over texts of each layer's relative change of the attention output, fp32 [N] each."""
    model, chosen = context.running, _training.whole(context.geometry)
    read = texts(context, samples=options.samples, tokens=options.tokens)
    found = torch.zeros(3, len(layers))
    for done, sample in enumerate(read, 1):
        seen = _training.states(model, sample)
        for at, (number, layer) in enumerate(zip(chosen, layers, strict=True)):
            weight, view = model.output_projection(number), seen[number]
            numbers = max(1, int(ranks[at].sum()) - int(layer.rope.sum()))
            variants = (layer.without_rope(view), layer.without_rope(view, numbers), layer.kept(view, ranks[at]))
            found[:, at] += torch.tensor([_ranks.output_change(view, *states, weight) for states in variants])
        context.progress(done, len(read), "losses")
    names = ("nope_error", "converted_error", "error")
    return dict(zip(names, found / len(read), strict=True))
