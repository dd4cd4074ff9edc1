"""Eigen Attention: attention in the principal subspaces of keys and values, as small as a layer's output allows.

Saxena et al., arXiv 2408.05646, EMNLP Findings 2024, with its released code for models with RoPE.

    keys before RoPE: one basis D × r_k a layer, of all its KV heads' keys together;  values: one D × r_v a KV head
    r = least rank with Σ_{i≤r} σ² ≥ τ Σ σ²;   τ falls from 1 by 0.02 while ‖(o − ô) W_Oᵀ‖ < error · ‖o W_Oᵀ‖
    memory 16·(r_k + r_v)/2D bits a number

The last τ that a layer bears is taken, and no rank falls below `floor` of D (released: 45 %). o is the layer's
attention output over whole texts, ô the same over the model's own queries with keys and values through their bases, of
all entries alike. A values' rank is that of the layer: the largest that a head of it needs.

With `budget` there is no search: one τ for all layers, the largest whose latents fit. `rule=code` counts as the
released code does: σ instead of σ² (so that τ keeps more), and one rank fewer than reach τ. It also averages batches
before the decomposition, which shrinks what differs between texts; this is not reproduced. Departures: the released
error is that of the decoder layer's output; and its bases come from 128 texts, ours from whatever was profiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods import _ranks, _training
from kvtool.methods._base import Context, Decision, share
from kvtool.methods._prompts import texts
from kvtool.options import at_least
from kvtool.statistics._base import States

STATISTICS = ("gram",)
MODEL = True

STEP = 0.02  # by which τ falls
Spectra = list[torch.Tensor]  # of keys and of values


@dataclass(frozen=True)
class Options:
    """error: relative change of a layer's attention output that is borne. floor: ranks go no lower, a share of D, in
    the search. budget: share of the bytes of 16-bit keys and values that latents take; 0 for as many as `error` asks
    for. rule: energy, or code for the released code's count. samples, tokens: texts and their length that errors are
    measured on. sink: first entries that stay raw. recent: newest entries that stay raw. block: entries that leave the
    raw window together."""

    error: float = 0.025
    floor: float = 0.45
    budget: float = 0.0
    rule: Literal["energy", "code"] = "energy"
    samples: int = 2
    tokens: int = 512
    sink: int = 0
    recent: int = 0
    block: int = 32

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "block")
        at_least(0, self, "sink", "recent")
        share(self.floor, "floor")
        share(self.budget, "budget")
        if self.error < 0:
            raise InputError("bad option error", got=self.error, expected="0 or more")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g, layers = context.geometry, _training.whole(context.geometry)
    keys, values = (gram[layers] for gram in _ranks.moments(context.seen, g.kv_heads, 1))
    found = [_ranks.principal(gram) for gram in (keys.mean(1, keepdim=True), values)]
    energy, bases = [each[0] for each in found], [each[1] for each in found]  # [N,1|K,D] and [N,1|K,D,D]
    if options.budget:
        ranks, errors = fitting(energy, options, g.head_dim), torch.zeros(len(layers))
    else:
        ranks, errors = searched(context, options, energy, bases)
    pairs = _ranks.projected(layers, bases, ranks, 1)
    store = _ranks.store(g, pairs, sink=options.sink, recent=options.recent, block=options.block)
    evidence = {"ranks": ranks.int(), "error": errors.float()}
    return Decision(store=store, evidence=evidence, facts=_ranks.facts(energy, ranks, g.head_dim))


def reach(energy: torch.Tensor, threshold: float, rule: str = "energy") -> torch.Tensor:
    """λ [...,n] → the least rank that keeps `threshold` of Σ λ, 1 to n: int64 [...]."""
    size = energy.sqrt() if rule == "code" else energy
    held = size.cumsum(-1) / size.sum(-1, keepdim=True).clamp_min(1e-300)
    short = (held < threshold - 1e-12).sum(-1) + (rule == "energy")
    return short.clamp(1, energy.shape[-1])


def largest(energy: Spectra, threshold: float, rule: str) -> torch.Tensor:
    """int64 [N,2]: the ranks of keys and values that the neediest of a layer's heads has."""
    return torch.stack([reach(each, threshold, rule).amax(1) for each in energy], 1)


def fitting(energy: Spectra, options: Options, width: int) -> torch.Tensor:
    """Ranks int64 [N,2] under the largest common threshold whose latents take no more than `budget`."""
    low, high = 0.0, 1.0 + 1e-9
    if options.budget == 1.0:
        return torch.full((len(energy[0]), 2), width)
    for _ in range(40):
        middle = (low + high) / 2
        fits = float(largest(energy, middle, options.rule).double().mean()) <= options.budget * width
        low, high = (middle, high) if fits else (low, middle)
    return largest(energy, low, options.rule)


def searched(context: Context, options: Options, energy: Spectra, bases: Spectra) -> tuple[torch.Tensor, torch.Tensor]:
    """(ranks int64 [N,2], their errors [N]): per layer the lowest threshold before the first that errs too much."""
    model, width = context.running, context.geometry.head_dim
    read = texts(context, samples=options.samples, tokens=options.tokens)
    seen = [_training.states(model, sample) for sample in read]
    found, errors, least = [], [], max(1, round(options.floor * width))
    layers = _training.whole(context.geometry)
    for at, layer in enumerate(layers):
        held, error, threshold = torch.full((2,), width), 0.0, 1.0
        views, projection = [each[layer] for each in seen], model.output_projection(layer)
        while threshold > STEP:
            threshold -= STEP
            ranks = largest(energy, threshold, options.rule)[at].clamp_min(least)
            through = [bases[side][at, :, :, : int(ranks[side])].float() for side in (0, 1)]
            now = max(output_error(view, through[0], through[1], projection) for view in views)
            if now >= options.error:
                break
            held, error = ranks, now
            if int(ranks.max()) == least:
                break
        found.append(held)
        errors.append(error)
        context.progress(at + 1, len(layers), f"ranks {held.tolist()} of {width}")
    return torch.stack(found), torch.tensor(errors)


def output_error(view: States, keys: torch.Tensor, values: torch.Tensor, projection: torch.Tensor) -> float:
    """The relative change of a layer's output with keys through [1,D,r], before RoPE, and values through [K,D,r]."""
    keys, values = keys.to(view.k.device), values.to(view.k.device)
    k = view.rotary.rotate(view.k_pre.float() @ keys @ keys.transpose(1, 2), view.table).to(view.k.dtype)
    v = (view.v.float() @ values @ values.transpose(1, 2)).to(view.v.dtype)
    return _ranks.output_change(view, view.q, k, v, projection)
