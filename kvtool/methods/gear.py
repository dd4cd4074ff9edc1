"""GEAR: a quantiser, the numbers that it would suffer from kept apart, and its error in a few directions.

Kang et al., arXiv 2403.05527, with its released code.

    x ≈ D̂ + S + Q·P;   S: the numbers of each vector furthest from its mean, a share `outliers` of them
    D̂ = quantised x with the mean of the rest in their place;   Q·P: the best product of rank ρ for x − D̂ − S
    vectors: a channel of `block` tokens for keys (after RoPE), a token of one head for values
    memory a number: b + 32/group + outliers·32 + 16ρ(1/block + 1/D) bits

Two quantisers: `kivi` (keys per channel, values per token, groups of `group` numbers), `kcvt` (whole vectors).
`outliers=0` is GEAR-L. Q·P comes from power iteration, three rounds from a fixed start, and never adds to the error.

Departures from the released code: there the prompt is one block, whose rank is 4, and generated tokens come in blocks
of 64, whose rank is 2; here all blocks are alike, those of the prompt too, so that what a prompt costs does not depend
on how it was cut. It takes as many outliers above as below, and of keys the count that is right for a token; its levels
are b², right for 2 and 4 bits only; its fused kernel gives all rows of a batch the first one's basis. `mode=calibrated`
(ours) deals the same bytes of bases to layers, keys and values by how much each direction takes of their error on
texts, relative to how far what is held spreads about its mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.methods._base import Context, Decision, share
from kvtool.methods._prompts import texts
from kvtool.options import at_least
from kvtool.slots import Store

STATISTICS = ()
MODEL = False  # but in mode=calibrated


@dataclass(frozen=True)
class Options:
    """bits: of keys and values, 1 to 8. base: kivi (ranges of `group` numbers), kcvt (of whole vectors). group: tokens
    of a channel, or channels of a token, that share a range. outliers: share of numbers that stay as they are; 0 is
    GEAR-L. rank: of a block's error; 0: none. mode: fixed (the same rank everywhere), calibrated (that many on
    average). block: tokens that are written together. recent: newest entries that stay raw. sink: first entries that
    stay raw. samples, tokens: texts that are read in mode=calibrated, and their length."""

    bits: int = 2
    base: Literal["kivi", "kcvt"] = "kivi"
    group: int = 64
    outliers: float = 0.02
    rank: int = 2
    mode: Literal["fixed", "calibrated"] = "fixed"
    block: int = 64
    recent: int = 0
    sink: int = 0
    samples: int = 2
    tokens: int = 512

    def __post_init__(self) -> None:
        at_least(0, self, "rank", "recent", "sink")
        at_least(1, self, "samples")
        share(self.outliers, "outliers")
        if self.tokens < self.block:
            raise InputError("bad option tokens", got=self.tokens, expected=f"a block of {self.block} or more")


def at(budget: float) -> dict[str, Any]:
    """The nearest width, counted against 16-bit numbers as they are served: about two bits go to all the rest."""
    return {"bits": min(8, max(1, round(16 * budget - 2)))}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    bare = sides(options, g.head_dim)
    ranks = torch.full((g.layers, 2), options.rank)
    if options.mode == "calibrated":
        ranks = dealt(spectra(context, options, bare), options.rank)
    made = {
        pair: [with_rank(side, rank, options.block) for side, rank in zip(bare, pair, strict=True)]
        for pair in sorted(set(map(tuple, ranks.tolist())))
    }
    index = torch.tensor([list(made).index(tuple(pair)) for pair in ranks.tolist()], dtype=torch.int32)
    keys, values = (tuple(pair[side] for pair in made.values()) for side in range(2))
    store = Store(
        keys, values, index[:, None].repeat(1, g.kv_heads), options.sink, options.recent, options.block
    )  # fmt: skip
    return Decision(store=store, evidence={"ranks": ranks})


def sides(options: Options, width: int) -> tuple[Encoding, Encoding]:
    """Keys and values without a basis of their errors."""
    group = options.group if options.base == "kivi" else options.block
    per_token = min(options.group, width) if options.base == "kivi" else width
    keys, values = Affine(options.bits, group, "token"), Affine(options.bits, per_token, "channel")
    counts = [min(size, max(1, round(options.outliers * size))) for size in (options.block, width)]
    if not options.outliers:
        return Encoding(keys), Encoding(values)
    return (
        Encoding(keys, outliers=Outliers(counts[0], "token", options.block)),
        Encoding(values, outliers=Outliers(counts[1], "channel")),
    )


def with_rank(side: Encoding, rank: int, block: int) -> Encoding:
    return replace(side, error=ErrorBasis(rank, block) if rank else None)


def spectra(context: Context, options: Options, bare: tuple[Encoding, Encoding]) -> torch.Tensor:
    """Mean squared singular values of the errors of blocks, fp64 [L,2,min(block,D)], of a layer's and side's spread."""
    width = min(options.block, context.geometry.head_dim)
    energy = torch.zeros(context.geometry.layers, 2, width, dtype=torch.float64)
    spread = torch.zeros(context.geometry.layers, 2, 1, dtype=torch.float64)
    read = texts(context, samples=options.samples, tokens=options.tokens)
    for number, sample in enumerate(read, 1):
        for seen in _training.states(context.running, sample):
            for at, (side, x) in enumerate(zip(bare, (seen.k, seen.v), strict=True)):
                blocks = x[None, :, : x.shape[1] // options.block * options.block].float()
                error = (side.decode(side.encode(blocks), x.shape[-1]) - blocks).unflatten(2, (-1, options.block))
                about = blocks.unflatten(2, (-1, options.block))
                energy[seen.layer, at] += torch.linalg.svdvals(error).double().square().sum((0, 1, 2)).cpu()
                spread[seen.layer, at] += (about - about.mean(3, keepdim=True)).double().square().sum().cpu()
        context.progress(number, len(read), "errors of blocks")
    return energy / spread.clamp_min(torch.finfo(torch.float64).tiny)


def dealt(energy: torch.Tensor, rank: int) -> torch.Tensor:
    """Ranks int64 [L,2] that take most of the energy [L,2,N] and are `rank` on average."""
    count = min(rank * energy[..., 0].numel(), energy.numel())
    taken = torch.zeros(energy.numel(), dtype=torch.int64)
    taken[energy.flatten().argsort(descending=True, stable=True)[:count]] = 1
    return taken.reshape(energy.shape).sum(-1)
