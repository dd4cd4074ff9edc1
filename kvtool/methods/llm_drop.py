"""LLM-Drop: the attention layers that change the residual stream least are left out.

He et al., "What Matters in Transformers? Not All Attention is Needed", arXiv 2406.15786.

    s_l = mean over tokens of cos(x, x + Attn(LN(x)));   the layers with the highest s_l attend to nothing

    memory ×(1 − n/L)

One shot, as the released code's attention dropping; its variants that drop MLPs too, or measure again after each drop,
are not here. A dropped layer attends to nothing in prefill either, and holds nothing, but its projections still run:
the memory is saved, their time is not. What its attention puts out is zero before the output projection, so that the
bias of that projection stays where a model has one (the released code drops it too). The cosine knows no scale, and
says nothing between models: only the order counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.slots import Keep

STATISTICS = ("residual",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """drop: layers whose attention is left out; a share of them if below 1, else so many."""

    drop: float = 0.25

    def __post_init__(self) -> None:
        if self.drop < 0:
            raise InputError("bad option drop", got=self.drop, expected="a share below 1, or a count of layers")


def at(budget: float) -> dict[str, Any]:
    return {"drop": 1 - budget}


def calibrate(context: Context, options: Options) -> Decision:
    statistic, layers = context.seen["residual"], context.geometry.layers
    similarity = (statistic["attention"] / statistic["tokens"]).float()
    count = min(layers, round(options.drop if options.drop >= 1 else options.drop * layers))
    gone = similarity.argsort(descending=True, stable=True)[:count]
    dropped = torch.zeros(layers, dtype=torch.uint8)
    dropped[gone] = 1
    everything = torch.ones(layers, context.geometry.kv_heads)
    keep = Keep.heads(everything, sink=0, recent=1, dropped=dropped)
    return Decision(keep, {"similarity": similarity}, {"dropped": gone.tolist()})
