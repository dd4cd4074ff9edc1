"""KIVI: 2-bit keys per channel, 2-bit values per token, the newest entries as they are.

Liu et al., arXiv 2402.02750, ICML 2024.

    keys (after RoPE): groups of g tokens of one channel;  values: groups of g channels of one token
    s = (max − min)/(2^b − 1),  code = round((x − min)/s);   memory: b + 32/g bits a number, and raw recent entries

No statistic is needed. Departures from the released code: keys and values leave the raw window together, `block` at
a time (there values leave one by one, so that R of them are always raw, and keys when R have gathered, so that 0 to
R − 1 are); a group of equal numbers is exact instead of NaN; and the scale multiplies the query, or the softmax weight,
once a group, so that nothing is dequantised in the inner loop. The authors advise 4 bits for shared KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.methods._base import Context, Decision
from kvtool.slots import Store

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """bits: of keys and values, 1 to 8. group: tokens of a channel, or channels of a token, that share a range.
    recent: newest entries that stay raw. block: entries that leave the raw window together. sink: first entries that
    stay raw."""

    bits: int = 2
    group: int = 32
    recent: int = 128
    block: int = 128
    sink: int = 0


def at(budget: float) -> dict[str, Any]:
    """The nearest width, counted against 16-bit numbers as they are served: b + 32/32 of 16 bits."""
    return {"bits": min(8, max(1, round(16 * budget - 1)))}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    key, value = (
        Encoding(Affine(options.bits, options.group, "token")),
        Encoding(Affine(options.bits, options.group, "channel")),
    )
    index = torch.zeros(g.layers, g.kv_heads, dtype=torch.int32)
    return Decision(store=Store((key,), (value,), index, options.sink, options.recent, options.block))
