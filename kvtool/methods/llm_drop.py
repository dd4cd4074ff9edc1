"""LLM-Drop: the attention layers that change the residual stream least are left out.

He et al., "What Matters in Transformers? Not All Attention is Needed", arXiv 2406.15786.

    s_l = mean over tokens of cos(x, x + Attn(LN(x)));   the layers with the highest s_l attend to nothing

    memory ×(1 − n/L)

One shot, as the released code's attention dropping; or, with `again`, one layer after another, each time the one with
the highest s_l of a model that lacks those before, as its iterative script does. Its variants that drop MLPs too are
not here. A dropped layer attends to nothing in prefill either, and holds nothing, but its projections still run: the
memory is saved, their time is not. What its attention puts out is zero before the output projection, so that the
bias of that projection stays where a model has one (the released code drops it too). The cosine knows no scale, and
says nothing between models: only the order counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtool.errors import InputError
from kvtool.measuring.similarity import similarity
from kvtool.methods._base import Context, Decision
from kvtool.methods._prompts import texts
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ("residual",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """drop: layers whose attention is left out; a share of them if below 1, else so many. again: is similarity measured
    again after every drop, on texts, instead of once, in a trace. samples, tokens: those texts and their length."""

    drop: float = 0.25
    again: bool = False
    samples: int = 4
    tokens: int = 512

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "tokens")
        if self.drop < 0:
            raise InputError("bad option drop", got=self.drop, expected="a share below 1, or a count of layers")


def at(budget: float) -> dict[str, Any]:
    return {"drop": 1 - budget}


def reads(options: Options) -> tuple[str, ...]:
    return () if options.again else STATISTICS


def calibrate(context: Context, options: Options) -> Decision:
    layers = context.geometry.layers
    count = min(layers, round(options.drop if options.drop >= 1 else options.drop * layers))
    if options.again:
        gone, alike = _one_by_one(context, options, count)
    else:
        statistic = context.seen["residual"]
        alike = (statistic["attention"] / statistic["tokens"]).float()
        gone = alike.argsort(descending=True, stable=True)[:count].tolist()
    return Decision(_without(context, gone), {"similarity": alike}, {"dropped": gone})


def _one_by_one(context: Context, options: Options, count: int) -> tuple[list[int], torch.Tensor]:
    """Layers in the order in which they go, and s [L]: of each as it went, of the others when the last one did."""
    read = texts(context, samples=options.samples, tokens=options.tokens)
    gone: list[int] = []
    alike = torch.zeros(context.geometry.layers)
    for number in range(1, count + 1):
        left = [layer for layer in range(len(alike)) if layer not in gone]
        alike[left] = similarity(context.running, read, _without(context, gone))[left]
        gone.append(left[int(alike[left].argmax())])
        context.progress(number, count, "layers dropped")
    return gone, alike


def _without(context: Context, gone: Sequence[int]) -> Keep:
    dropped = torch.zeros(context.geometry.layers, dtype=torch.uint8)
    dropped[list(gone)] = 1
    everything = torch.ones(context.geometry.layers, context.geometry.kv_heads)
    return Keep.heads(everything, sink=0, recent=1, dropped=dropped)
