"""CacheGen: caches of documents kept for later runs: fewer levels in deeper layers, one scale an entry, entropy coding.

Liu et al., SIGCOMM 2024, arXiv 2310.07240.

    per layer, side and entry: m = max |x| over all channels of all heads,  M = bins/2 − 1
    code = round(x·M/m) + M ∈ [0, 2M],   x̂ = (code − M)/M · m
    delta: of `group` entries the first is the anchor a, in 8 bits; the others are written as x − â

No statistic is needed. Levels 1 to 3 are those of the released code, which has no deltas, for a model of 32 layers:
keys 16, 16, 12 bins in layers from 0, 10 and 20 on and values 16, 12 in layers from 0 and 2 on; 32, 16, 16 and 32, 16;
32 everywhere. Borders move with the number of layers. In memory a code takes ⌈log₂ bins⌉ bits and nothing is entropy-
coded, since attention reads it there; `kvtool save` writes each channel of each layer with its own frequencies.

The deltas are reconstructed from memory of the paper: groups of 10 tokens with an 8-bit anchor. There the step of a
delta is a constant that grows with depth; here it has the bins of the level, and a scale of its own. It predicts from
the anchor as it is read back, so that no error adds up. Departures from the released code: an entry of nothing but
zeros is exact, there it is divided by 0; frequencies are exact for the document instead of read from the wrapped 16-bit
sums of a chunk; streams have no lengths of their own, which took 32 bits for every channel and 256 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Codec, Delta, Levels
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Join
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Store

STATISTICS = ()
MODEL = False
Steps = tuple[tuple[float, int], ...]  # from this share of the layers on, so many bins
LEVELS: dict[int, tuple[Steps, Steps]] = {  # keys, values
    1: (((0, 16), (20 / 32, 12)), ((0, 16), (2 / 32, 12))),
    2: (((0, 32), (10 / 32, 16)), ((0, 32), (2 / 32, 16))),
    3: (((0, 32),), ((0, 32),)),
}
ANCHOR = 256  # bins


@dataclass(frozen=True)
class Options:
    """level: 1 to 3, as released: fewer bins to more. key_bins, value_bins: 4 to 256, one number for each of so many
    equal parts of the layers, instead of the level's. delta: write differences to the first entry of each group. group:
    entries of such a group. scale: of all heads of a layer, or of each head; only then other plans may treat heads
    differently. rope: whether keys are written after their rotation, or before it, free of their positions. recent:
    newest entries that stay raw. block: entries that leave the raw window together. sink: first entries that stay raw.
    """

    level: int = 2
    key_bins: tuple[int, ...] = ()
    value_bins: tuple[int, ...] = ()
    delta: bool = False
    group: int = 10
    scale: Literal["layer", "head"] = "layer"
    rope: Literal["after", "before"] = "after"
    recent: int = 0
    block: int = 10
    sink: int = 0


def at(budget: float) -> dict[str, Any]:
    """The nearest width of codes everywhere; the scale of an entry is left out."""
    bins = (2 ** min(8, max(2, round(16 * budget))),)
    return {"key_bins": bins, "value_bins": bins}


def calibrate(context: Context, options: Options) -> Decision:
    at_least(0, options, "recent", "sink")
    if options.level not in LEVELS:
        raise InputError("bad option level", got=options.level, expected="1, 2 or 3")
    g, steps = context.geometry, LEVELS[options.level]
    sides = [
        _each_layer(chosen or released, g.layers)
        for chosen, released in zip((_even(options.key_bins), _even(options.value_bins)), steps, strict=True)
    ]
    pairs = sorted(set(zip(*sides, strict=True)), reverse=True)
    joined = g.kv_heads if options.scale == "layer" else 1
    join = (Join(joined),) if joined > 1 else ()
    width = joined * g.head_dim
    keys = tuple(Encoding(_codec(bins, width, options), join, rotated=options.rope == "after") for bins, _ in pairs)
    values = tuple(Encoding(_codec(bins, width, options), join) for _, bins in pairs)
    index = torch.tensor([pairs.index(pair) for pair in zip(*sides, strict=True)], dtype=torch.int32)
    index = index[:, None].repeat(1, g.kv_heads)
    evidence = {"bins": torch.tensor(sides, dtype=torch.int32)}
    return Decision(store=Store(keys, values, index, options.sink, options.recent, options.block), evidence=evidence)


def _even(bins: tuple[int, ...]) -> Steps:
    return tuple((part / len(bins), count) for part, count in enumerate(bins))


def _each_layer(steps: Steps, layers: int) -> list[int]:
    """Bins of every layer."""
    return [next(bins for start, bins in reversed(steps) if layer >= start * layers) for layer in range(layers)]


def symmetric(bins: int, width: int) -> Levels:
    """2·(bins/2 − 1) + 1 equal steps from −m to m, m the largest |x| of `width` channels; the table is filled up to a
    power of two with levels beyond m, which nothing reaches."""
    if not 4 <= bins <= 256:
        raise InputError("bad number of bins", got=bins, expected="4 to 256")
    most = bins // 2 - 1
    size = 1 << (2 * most).bit_length()
    return Levels((torch.arange(size) - most).float() / most, width, "channel", "peak")


def _codec(bins: int, width: int, options: Options) -> Codec:
    made = symmetric(bins, width)
    return Delta(symmetric(ANCHOR, width), made, options.group) if options.delta else made
