"""ZipCache: four bits for salient entries, two for the others; saliency from a few probing queries.

He et al., arXiv 2405.14256, NeurIPS 2024, sections 4.1 to 4.3.

    saliency of entry j for a KV head = Σ over probes of p_ij / #{probes i ≥ j};  probes: the newest 5 % of the queries
    and a random 5 % of the others;  the `salient` best are the high class, the rest the low one
    keys: each channel's range over the class;  values: c_i = √(max_t |v_ti|), then each token's range of v / c

so that values, whose channels differ, need one range a token and no groups. An entry's class is settled once, at the
end of the prompt. `mode=calibrated` takes the channels' ranges and c from texts, not from the prompt.

Departures from the released code: it divides by L − j, though only some of those rows are probes, which is not what
the paper says; there c is of all entries, here of each class; there a token's range is of all its KV heads, here of
each, whose entries differ; there everything is decoded and written again every 100 tokens, and new tokens are sorted by
one query's attention: here what is written stays, and new tokens join the high class, `block` at a time, in the ranges
of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine, Levels
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Ranges, Root
from kvtool.encoding.transforms import Scale
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share, thinned
from kvtool.options import at_least
from kvtool.slots import Store

STATISTICS = ("channels",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """salient: share of the entries in the high class. high, low: bits of the classes, 1 to 4. block: new entries that
    are written together; fewer stay raw. mode: prompt, or calibrated for ranges of channels fixed beforehand."""

    salient: float = 0.6
    high: int = 4
    low: int = 2
    block: int = 100
    mode: Literal["prompt", "calibrated"] = "prompt"

    def __post_init__(self) -> None:
        at_least(1, self, "block")
        if not 1 <= self.low <= self.high <= 4:
            raise InputError("bad bits", got=f"{self.high} and {self.low}", expected="1 <= low <= high <= 4")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """Bits of 16, with a quarter of a bit for the ranges of values: one class, or two if the mean lies between."""
    bits = 16 * budget - 0.25
    low = next((width for width in (3, 2) if bits >= width), 1)
    return {"high": low + 1, "low": low, "salient": min(1.0, max(0.02, bits - low))}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    keep = thinned(
        context, max(share(options.salient, "salient"), 1e-6), observe="probes", reduce="mean", group="mean",
        seed=context.seed,
    )  # fmt: skip
    make = _frozen if options.mode == "calibrated" else _fitted
    index = torch.zeros(g.layers, g.kv_heads, dtype=torch.int32)
    if options.mode == "calibrated":
        index += torch.arange(g.layers, dtype=torch.int32)[:, None]
    lower = Store(*make(context, options.low), index, block=1)
    return Decision(keep=keep, store=Store(*make(context, options.high), index, block=options.block, rest=lower))


def _values(bits: int, width: int) -> Affine:
    return Affine(bits, width, "channel")


def _fitted(context: Context, bits: int) -> tuple[tuple[Encoding, ...], tuple[Encoding, ...]]:
    value = _values(bits, context.geometry.head_dim)
    return (Encoding(Ranges(bits)),), (Encoding(value, (Root(),)),)


def _frozen(context: Context, bits: int) -> tuple[tuple[Encoding, ...], tuple[Encoding, ...]]:
    """One pair a layer, from the extremes that the profile saw."""
    seen = context.seen["channels"]
    levels, value = torch.linspace(-1, 1, 2**bits), _values(bits, context.geometry.head_dim)
    keys, values = [], []
    for layer in range(context.geometry.layers):
        low, high = seen["k.min"][layer].float(), seen["k.max"][layer].float()
        keys.append(Encoding(Levels(levels, 1, "channel", "fixed", (high - low) / 2, (high + low) / 2)))
        size = torch.maximum(seen["v.max"][layer], -seen["v.min"][layer]).float().clamp_min(0).sqrt()
        values.append(Encoding(value, (Scale(torch.where(size == 0, torch.ones_like(size), size)),)))
    return tuple(keys), tuple(values)
