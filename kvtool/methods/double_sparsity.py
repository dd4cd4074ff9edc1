"""Double Sparsity: a few channels of every key tell which entries are worth reading.

Yang et al., arXiv 2408.07092.

    offline: rank the channels of each KV head by E over a text; C = the first r of them
    s_j = max over the group's query heads of Σ_{c ∈ C} q_c · k_jc;   a step reads the entries with the largest s
    held: everything, and r labels per entry of `bits` bits, besides a 16-bit scale and zero per entry and KV head

Ranks by: `q` E|q_c|, `k` E|k_c|, both before RoPE; `qk` E|q_c · k_c| of the same token, after it; `pair` E|q_p|·|k_p|
of the pairs that RoPE turns together (ours: what a channel can contribute at any distance). The labels are of keys
after RoPE, and codes of labels are really packed.

Where we depart from the released code (andy-yang-1/DoubleSparse, b0575e6; cards B15, C5): channels are ranked once for
a KV head, over its group's queries, where the code has an order for every query head, hence G times the labels. Its
`qk` statistic keeps the last block only, because the key that it tests is not the one that it writes; here it is
summed. A prompt is read whole (its evaluation thins prompt rows, too). Sinks and recent entries are always read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ("products",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a step reads, a share of all when at most 1, else a count. channels: labels of an entry.
    bits: of a label; 0 leaves it as it is. rank: what channels are ranked by. heads: how the query heads of a KV head
    agree, or each reads its own. dense: first layers that read everything. sink, recent: entries that are always read.
    page: entries that memory hands out at once, for the count of bytes."""

    budget: float = 0.0625
    channels: int = 16
    bits: int = 4
    rank: Literal["q", "k", "qk", "pair"] = "qk"
    heads: Literal["max", "mean", "sum", "each"] = "max"
    dense: int = 2
    sink: int = 0
    recent: int = 16
    page: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "channels", "page")
        at_least(0, self, "bits", "dense", "sink", "recent")
        if self.budget <= 0:
            raise InputError("bad option budget", got=self.budget, expected="more than 0")
        if self.bits > 8 or (self.bits and self.channels % 8):
            raise InputError(
                "labels in codes are packed by eights", got=f"{self.channels} channels of {self.bits} bits",
                expected="8, 16, 24, … channels and at most 8 bits, or bits=0",
            )  # fmt: skip


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    if options.channels > context.geometry.head_dim:
        raise InputError("more labels than channels", got=options.channels, expected=context.geometry.head_dim)
    seen = context.seen["products"]
    energy = seen[options.rank] / seen["tokens"] / context.geometry.group
    order = energy.argsort(dim=-1, descending=True, stable=True).int()
    budget = torch.full((context.geometry.layers,), options.budget)
    budget[: options.dense] = 1.0
    read = Read(
        budget, unit=1, summary="channels", table=order, rank=options.channels, bits=options.bits, heads=options.heads,
        sink=options.sink, recent=options.recent, page=options.page,
    )  # fmt: skip
    ranked = energy.sort(-1, descending=True).values
    share = ranked[..., : options.channels].sum(-1) / ranked.sum(-1).clamp_min(torch.finfo(ranked.dtype).tiny)
    return Decision(read=read, evidence={"energy": energy.float(), "share": share.float()})
