"""PolarQuant: keys as angles and radii of the pairs of channels that RoPE turns.

Wu et al., arXiv 2502.00527, NeurIPS 2025, with its released code.

    φ = atan2(k_{c+D/2}, k_c) in [0, 2π),  ρ = √(k_c² + k_{c+D/2}²)        after RoPE, which turns φ and leaves ρ
    per pair and group of g tokens:  step = (max − min)/2^b,  code = ⌊(x − min)/step⌋,  x̂ = min + (code + ½)·step
    memory: (angle + radius)/2 + 32/g bits a number of keys

Channels that are large come in pairs whose radius hardly changes, so that what varies is an angle. Values are another
method's affair there; here they are KIVI's (`values` bits, groups of channels), or stay as they are (16).

Departures from the released code: a range of 0 comes back as it is instead of NaN; codes of any widths are packed bit
by bit; attention decodes keys block by block, where theirs gathers the query's products with every angle from a table.

`form=nested` is another paper of this name (Han et al., arXiv 2502.02617), from memory: entries, keys and values alike,
are turned at random; neighbours become an angle and a radius, radii again so, four times; angles take 4, 2, 2 and 2
bits in cells that suit a turned entry, and a radius for 16 channels is fp16. Nothing else is held: 3.875 bits a number.
Its tables may be others; ours are the best for independent normal numbers. Keys are turned after RoPE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine, Nested, Polar
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Linear
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.methods._rotations import rotation
from kvtool.slots import Store

STATISTICS = ()
MODEL = False
AS_THEY_ARE = 16


@dataclass(frozen=True)
class Options:
    """angle, radius: bits of each pair's, 1 to 8. group: tokens of a pair that share their ranges. values: bits of
    values, 1 to 8, or 16 to leave them as they are. value_group: channels of a value that share a range. recent: newest
    entries that stay raw. block: entries that leave the raw window together. sink: first entries that stay raw. form:
    pairs, or nested, for both sides alike, which levels is for. levels: bits of each level's angles."""

    angle: int = 4
    radius: int = 4
    group: int = 128
    values: int = 16
    value_group: int = 32
    recent: int = 0
    block: int = 128
    sink: int = 0
    form: Literal["pairs", "nested"] = "pairs"
    levels: tuple[int, ...] = (4, 2, 2, 2)

    def __post_init__(self) -> None:
        if self.values != AS_THEY_ARE and not 1 <= self.values <= 8:
            raise InputError("bad option values", got=self.values, expected="1 to 8, or 16")


def at(budget: float) -> dict[str, Any]:
    """Half of the bits for values, with 32 beside 32 codes; the odd bit of a pair goes to its angle."""
    values = min(8, max(1, math.floor(16 * budget - 1)))
    pair = math.floor(2 * (32 * budget - values - 1 - 0.25))
    return {"angle": min(8, max(1, -(-pair // 2))), "radius": min(8, max(1, pair // 2)), "values": values}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    index = torch.zeros(g.layers, g.kv_heads, dtype=torch.int32)
    if options.form == "nested":
        turn = rotation(g.head_dim, torch.Generator().manual_seed(context.seed))[None]
        both = Encoding(Nested(options.levels), (Linear(turn, turn.mT.contiguous()),))
        return Decision(store=Store((both,), (both,), index, options.sink, options.recent, options.block))
    key = Encoding(Polar(options.angle, options.radius, options.group))
    value = Encoding()
    if options.values != AS_THEY_ARE:
        value = Encoding(Affine(options.values, options.value_group, "channel"))
    return Decision(store=Store((key,), (value,), index, options.sink, options.recent, options.block))
