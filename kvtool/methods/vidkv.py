"""VidKV: below two bits, by the kind of channel; made for video, here for any tokens.

Tao et al., arXiv 2503.16257.

    keys: the channels with the widest range, a share `wide` of them, in 2 bits; the others, in their own order, through
    a real Fourier transform along the token, then one bit each: ±mean |x|             (groups of g tokens of a channel)
    values: t ∈ {−1, 0, 1}, t ≠ 0 where |x| > mean |x| / 2;  x̂ = s·t, s the mean |x| of those     (the same groups)

Where the easy channels of a token resemble one another their energy gathers in few frequencies, and signs err less. The
transform is orthonormal and the same for all tokens, so a query goes through it instead of the keys coming back.
`mode=calibrated` ranks channels by the range that texts gave them.

Departures from the released code: it takes all n complex frequencies, 2n real numbers, so that one bit becomes two, and
this the n real ones that there are; it restores ternary values without their scale; there one mask serves all KV heads
of a layer, here each has its own; and it writes everything again every 128 tokens. Salient tokens in more bits, found
by likeness to a text prompt, are left out: a selection with a lower rest (see mikv) says the same of any tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine, Codec, Levels, Split, Ternary
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Spread, widest
from kvtool.encoding.transforms import Gather, Linear, Transform
from kvtool.methods._base import Context, Decision, share
from kvtool.slots import Store

STATISTICS = ("channels",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """wide: share of the key channels that get two bits. group: tokens of a channel that share a scale. recent: newest
    entries that stay raw. block: entries that leave them together. sink: first entries that stay raw. frequencies:
    transform the other channels before their signs. mode: prompt, or calibrated for channels ranked beforehand."""

    wide: float = 0.5
    group: int = 32
    recent: int = 32
    block: int = 32
    sink: int = 0
    frequencies: bool = True
    mode: Literal["prompt", "calibrated"] = "prompt"


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """Values take about two bits of 16, keys from 1.5 to 3 with their scales."""
    return {"wide": min(1.0, max(0.0, (32 * budget - 2.25 - 1.5) / 1.5))}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    hard = round(share(options.wide, "wide") * g.head_dim)
    easy = g.head_dim - hard
    codecs: list[tuple[Codec, int]] = [(Affine(2, options.group, "token"), hard)]
    codecs += [(Levels(torch.tensor([-1.0, 1.0]), options.group, "token", "absolute"), easy)]
    parts = [(codec, width) for codec, width in codecs if width]
    codec = (
        Split(tuple(codec for codec, _ in parts), tuple(width for _, width in parts)) if len(parts) > 1 else parts[0][0]
    )
    after: tuple[Transform, ...] = (_frequencies(hard, easy),) if options.frequencies and easy else ()
    index = torch.zeros(g.layers, g.kv_heads, dtype=torch.int32)
    orders: list[Transform] = [Spread(hard)]
    if options.mode == "calibrated":
        seen = context.seen["channels"]
        orders = [Gather(widest(ranges, hard), g.head_dim) for ranges in seen["k.max"] - seen["k.min"]]
        index += torch.arange(g.layers, dtype=torch.int32)[:, None]
    keys = tuple(Encoding(codec, (order, *after)) for order in orders)
    values = (Encoding(Ternary(options.group, "token")),) * len(keys)
    return Decision(store=Store(keys, values, index, options.sink, options.recent, options.block))


def _frequencies(before: int, width: int) -> Linear:
    """The first channels as they are, the last `width` through the orthonormal real Fourier basis."""
    basis = torch.eye(before + width, dtype=torch.float64)
    basis[before:, before:] = fourier(width)
    return Linear(basis[None].float(), basis.T[None].float())


def fourier(n: int) -> torch.Tensor:
    """The real Fourier basis fp64 [n,n] in columns: the mean, cosines and sines in turn, last the alternation."""
    at = torch.arange(n, dtype=torch.float64)[:, None] * (2 * math.pi / n)
    columns = [torch.full((n, 1), n**-0.5, dtype=torch.float64)]
    for frequency in range(1, (n + 1) // 2):
        columns += [(2 / n) ** 0.5 * (frequency * at).cos(), (2 / n) ** 0.5 * (frequency * at).sin()]
    if n % 2 == 0:
        columns.append(n**-0.5 * (n / 2 * at).cos())
    return torch.cat(columns, dim=1)
