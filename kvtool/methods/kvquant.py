"""KVQuant: keys before RoPE per channel, values per token, in levels that fit what the loss feels; outliers apart.

Hooper et al., arXiv 2401.18079, NeurIPS 2024, with its released code.

    A = (x − z)/ρ,  z and ρ the middle and half-width of a range;   x̂ = z + ρ·level[code]
    keys: a channel's range is between its quantiles 1 − t and t over the texts, t = 1 − outliers/2, known beforehand
    values: the range of a token's numbers, of all KV heads, once their outliers are out
    levels of a layer and side = argmin Σ F·min_j (A − level_j)²,  F = (∂loss/∂x)²          (2^bits of them)
    Q-Norm: chosen by `level`, restored by level·σ₁/σ₂ + μ₁ − μ₂·σ₁/σ₂ (1: moments of A, 2: of A snapped)

    memory: bits + 32·n/C a number, n = ⌈outliers·C⌉ outliers a token of C = K·D numbers, + 32/C for values

Outliers have a fixed capacity a token (the "cap" variant): the n keys furthest from the middle of their range, in its
half-widths, the n values furthest from the token's mean, as fp16 with a place of 16 bits. Levels fit what is left
within its range. F is from a real backward pass over each text. The first `sink` tokens stay raw, in calibration and in
the cache.

Departures from the released code: it takes as many outliers on either side, keeps of these only what is beyond the
range, and has the counts of one model written in; its k-means starts from random centres, ours finds the best borders
in a histogram (`encoding/codebook.py`); it weighs by F where the harm of an error in A is F·ρ² (`weights=scaled`); its
Q-Norm calls a helper with an argument that it does not take. Codes are written `block` tokens at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kvtool.encoding import codebook
from kvtool.encoding.codecs import Levels
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import Outliers
from kvtool.encoding.transforms import Join, Transform
from kvtool.errors import InputError
from kvtool.measuring.fisher import felt
from kvtool.measuring.quantiles import Tails
from kvtool.methods import _training
from kvtool.methods._base import Context, Decision, share
from kvtool.methods._prompts import texts
from kvtool.options import at_least
from kvtool.slots import Store

STATISTICS = ()
MODEL = True


@dataclass(frozen=True)
class Options:
    """bits: of keys and values, 1 to 8. outliers: share of numbers that stay as they are. weights: of a number in the
    choice of levels: fisher (squared gradient of the loss), scaled (times its squared half-width), none. qnorm: bits up
    to which restored levels get the moments of what they stand for; 0: never. across: what of a token shares outliers
    and, of values, a range: layer (all KV heads), head. levels: fitted, or even ones to compare with. keys: whose
    numbers share a range: channel, or token to compare with. rope: before, or after it to compare with. sink: first
    entries that stay raw. recent: newest entries that stay raw. block: entries that are written together. samples,
    tokens: texts that are read, and their length."""

    bits: int = 3
    outliers: float = 0.01
    weights: Literal["fisher", "scaled", "none"] = "fisher"
    qnorm: int = 2
    across: Literal["layer", "head"] = "layer"
    levels: Literal["fitted", "even"] = "fitted"
    keys: Literal["channel", "token"] = "channel"
    rope: Literal["before", "after"] = "before"
    sink: int = 4
    recent: int = 0
    block: int = 32
    samples: int = 4
    tokens: int = 512

    def __post_init__(self) -> None:
        at_least(0, self, "qnorm", "sink", "recent")
        at_least(1, self, "bits", "block", "samples", "tokens")
        share(self.outliers, "outliers")
        if self.tokens <= self.sink:
            raise InputError("bad option tokens", got=self.tokens, expected=f"more than the {self.sink} sinks")


def at(budget: float) -> dict[str, Any]:
    """The nearest width, counted against 16-bit numbers as they are served: outliers of 1 % take about a third of a
    bit."""
    return {"bits": min(8, max(1, round(16 * budget - 1 / 3)))}


def calibrate(context: Context, options: Options) -> Decision:
    g, model = context.geometry, context.running
    read = texts(context, samples=options.samples, tokens=options.tokens)
    tails = [Tails(len(read) * (options.tokens - options.sink), options.outliers) for _ in range(g.layers)]
    for number, sample in enumerate(read, 1):
        for states in _training.states(model, sample):
            k = states.k if options.rope == "after" else states.k_pre
            tails[states.layer].see(k[:, options.sink :])
        context.progress(number, 2 * len(read), "ranges of keys")
    pairs = [unfitted(options, g.head_dim, *keys.range()) for keys in tails]
    counts = torch.zeros(g.layers, 2, 2, 2, codebook.BINS, dtype=torch.float64)  # [L, side, by F or by 1, ...]
    for number, sample in enumerate(read, len(read) + 1):
        for layer in felt(model, sample, rotated=options.rope == "after"):
            given = (layer.k, layer.k_gradient), (layer.v, layer.v_gradient)
            for side, (x, gradient) in enumerate(given):
                x, gradient = (tensor[:, options.sink :].float() for tensor in (x, gradient))
                counts[layer.layer, side] += counted(pairs[layer.layer][side], x, gradient, options.weights)
        context.progress(number, 2 * len(read), "gradients of the loss")
    made = [
        [fitted(*side, options) for side in zip(pair, count, strict=True)]
        for pair, count in zip(pairs, counts, strict=True)
    ]
    index = torch.arange(g.layers, dtype=torch.int32)[:, None].expand(-1, g.kv_heads).clone()
    keys, values = (tuple(pair[side] for pair in made) for side in range(2))
    return Decision(store=Store(keys, values, index, options.sink, options.recent, options.block))


def unfitted(options: Options, width: int, scale: torch.Tensor, zero: torch.Tensor) -> tuple[Encoding, Encoding]:
    """Keys and values of one layer, in even levels. scale, zero: ranges of keys [K,D]."""
    steps: tuple[Transform, ...] = ()
    if options.across == "layer":
        steps, width = (Join(len(scale)),), scale.numel()
        scale, zero = scale.reshape(1, -1), zero.reshape(1, -1)
    even = torch.linspace(-1, 1, 2**options.bits)
    known, own = Levels(even, 1, "channel", "fixed", scale, zero), Levels(even, width, "channel")
    count = math.ceil(round(options.outliers * width, 6))  # 1 % of 300 are 3
    far = Outliers(count, "channel") if count else None
    values = Encoding(own, steps, far)
    if options.keys == "token":
        return replace(values, rotated=options.rope == "after"), values
    far = replace(far, scale=scale, zero=zero) if far is not None else None
    return Encoding(known, steps, far, rotated=options.rope == "after"), values


def counted(side: Encoding, x: torch.Tensor, gradient: torch.Tensor, weights: str) -> torch.Tensor:
    """x and its gradient [K,T,D] → histograms of what the codec is to write, in its ranges, by F and by 1."""
    codec, x, gradient = side.codec, x[None], gradient[None]
    assert isinstance(codec, Levels)
    for step in side.transforms:
        x, gradient = step.forward(x), step.forward(gradient)
    free = torch.ones_like(x, dtype=torch.bool)
    if side.outliers is not None:
        x, parts = side.outliers.split(x)
        free.scatter_(-1, parts["outliers.index"].long(), False)
    if codec.scale is not None and codec.zero is not None:
        scale, zero = codec.scale[:, None].to(x), codec.zero[:, None].to(x)
    else:
        low, high = x.aminmax(dim=-1, keepdim=True)
        scale, zero = (high - low) / 2, (high + low) / 2
    normal = (x - zero) / torch.where(scale == 0, torch.ones_like(scale), scale)
    free &= normal.abs() <= 1 + torch.finfo(torch.float32).eps
    weight = torch.ones_like(x) if weights == "none" else gradient.square()
    weight = weight * scale.square() if weights == "scaled" else weight
    return torch.stack([codebook.histogram(normal[free], by[free]) for by in (weight, torch.ones_like(x))]).cpu()


def fitted(side: Encoding, counts: torch.Tensor, options: Options) -> Encoding:
    """The side with the levels that fit its histograms [2,2,BINS]."""
    assert isinstance(side.codec, Levels)
    weighted, plain = counts
    table = side.codec.levels
    if options.levels == "fitted":
        table = codebook.levels(weighted if float(weighted[0].sum()) else plain, len(table))
    restored = None
    if options.bits <= options.qnorm and float(plain[0].sum()):
        (mean, size), (snapped, smaller) = (codebook.moments(c) for c in (plain, codebook.snapped(plain, table)))
        ratio = size / smaller if smaller else 1.0
        restored = (table * ratio + mean - snapped * ratio).float()
    return replace(side, codec=replace(side.codec, levels=table, restored=restored))
