"""RotateKV: keys before RoPE under one Hadamard transform of several heads, then in an order that puts like by like.

Su et al., arXiv 2501.16383, IJCAI 2025, with its released code.

    keys:   z = (x of `heads` KV heads, joined · H/√(heads·D))[order];   values: z = x·H/√D per head
    order = argsort of the mean of each rotated channel over the texts, signs and all
    both:   groups of neighbouring channels of one token, min and max times `clip`, s = (max − min)/(2^b − 1)
    memory: b + 32/group bits a number, and the raw tokens

The rotation spreads a channel's outliers over all of them, the order lets a group's range be narrow. The mean of the
rotated keys is the rotated mean, so the statistic `channels` has all that is needed. The Hadamard transform does not
commute with RoPE, so keys lie before it and are turned on every read, as they are there.

Departures from the released code: it counts 2^b as b² in its scales, right for 2 and 4 bits only; it finds its order on
the text that it is judged by; it folds the rotation of values into the weights, here the output of attention is rotated
back. There, tokens of a massive activation (the 20 largest numbers in each layer's input) stay raw; a cache does not
see those inputs, so the first `sink` tokens stand in. Heads are joined in powers of two that divide their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Gather, Hadamard, Join, Transform
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Store

STATISTICS = ("channels",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """bits: of keys and values, 1 to 8. group: channels that share a range, at most; the largest number that divides a
    layer's is taken. clip: factor of both ends of a range; 0 stands for .8 up to 2 bits, and 1 above. heads: KV heads
    that are rotated together, at most; 0: no rotation, of values neither, to compare with. order: mean, or none for
    channels as the rotation leaves them. sink: first entries that stay raw. recent: newest entries that stay raw.
    block: entries that are written together."""

    bits: int = 2
    group: int = 128
    clip: float = 0.0
    heads: int = 4
    order: Literal["mean", "none"] = "mean"
    sink: int = 4
    recent: int = 0
    block: int = 32

    def __post_init__(self) -> None:
        at_least(0, self, "heads", "sink", "recent")
        at_least(1, self, "bits", "group", "block")
        if not 0 <= self.clip <= 1:
            raise InputError("bad option clip", got=self.clip, expected="a factor up to 1")


def at(budget: float) -> dict[str, Any]:
    """The nearest width, counted against 16-bit numbers as they are served: b + 32/128 of 16 bits."""
    return {"bits": min(8, max(1, round(16 * budget - 1 / 4)))}


def calibrate(context: Context, options: Options) -> Decision:
    g, seen = context.geometry, context.seen["channels"]
    together = max(count for count in _powers(options.heads) if g.kv_heads % count == 0)
    channels = g.kv_heads * g.head_dim
    group = max(size for size in range(1, min(options.group, channels) + 1) if channels % size == 0)
    codec = Affine(options.bits, group, "channel", options.clip or (0.8 if options.bits <= 2 else 1.0))
    rotation: tuple[Transform, ...] = (Hadamard(),) if options.heads else ()
    for step in rotation:
        step.width(together * g.head_dim)  # raises InputError where there is no such transform
    steps = (Join(together), *rotation, Join(g.kv_heads // together))
    means = (seen["k_pre.sum"] / seen["tokens"]).float()[:, :, None]  # [L,K,1,D], as one entry of each head
    for step in steps:
        means = step.forward(means)
    means = means.flatten(1)  # [L,C]
    order = means.argsort(dim=-1, stable=True) if options.order == "mean" else torch.arange(channels).expand_as(means)
    keys = tuple(Encoding(codec, (*steps, Gather(each[None], channels)), rotated=False) for each in order)
    values = (Encoding(codec, (*rotation, Join(g.kv_heads))),) * g.layers
    index = torch.arange(g.layers, dtype=torch.int32)[:, None].expand(-1, g.kv_heads).clone()
    return Decision(
        store=Store(keys, values, index, options.sink, options.recent, options.block),
        evidence={"means": means}, facts={"heads": together, "group": group},
    )  # fmt: skip


def _powers(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [2**power for power in range(max(1, most).bit_length())]
