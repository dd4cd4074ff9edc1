"""LOOK-M, for text: what lies between markers is thinned, everything else stays.

Wan et al., arXiv 2406.18139, EMNLP Findings 2024. Published for prompts of text and images: text matters more, so all
of it stays, and images compete. Here the caller says what the other kind is by the markers that enclose it; tool
output, quoted documents and file listings are such things.

    text and the last `recent`·n entries stay; of what lies in spans, by accumulated attention, as many as `heavy`·n
    leaves room for (text comes first); without a span nothing leaves
    each other entry goes into the kept one whose key has the largest cosine
        avg        x_u ← (x_u + Σ x_e) / (1 + number of e)
        pivot      x_u ← (x_u + Σ (x_e + x_u) / 2) / (1 + number of e)
        weighted   x_u ← (x_u + Σ m_e x_e) / (1 + number of e), m the cosine, where its mean over heads is at least the
                   mean over all

    memory 2·b·d·K·L·(max(text, heavy·n) + recent·n + t − n): the budget is a lower bound

Compared with the released code (SUSTechBruce/LOOK-M, commit ecf0f51). There, an image is 576 entries at a known place,
and 65516 is taken from their scores in 16 bits; here the order is the same without it. Query heads have sets of their
own there; here a KV head has one, by the mean over its group. Markers count as text. A remark in the released code
doubts that pivot merging should count the kept entry itself; it does there, and here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from kvtool.cache.keep.spans import spellings
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, thinned

STATISTICS = ()
MODEL = True
MERGES = {"avg": "nearest", "pivot": "halfway", "weighted": "moving", "drop": "drop"}


@dataclass(frozen=True)
class Options:
    """open, close: markers between which entries compete. heavy: share of the prompt's entries that stay by score, text
    included. recent: share that stays for being the latest. merge: avg, pivot, weighted or drop."""

    open: tuple[str, ...] = ("<image>",)
    close: tuple[str, ...] = ("</image>",)
    heavy: float = 0.1
    recent: float = 0.1
    merge: Literal["avg", "pivot", "weighted", "drop"] = "avg"

    def __post_init__(self) -> None:
        if not (0 <= self.recent < 1 and self.heavy >= 0 and 0 < self.heavy + self.recent <= 1):
            raise InputError(
                "bad option heavy or recent", got=f"{self.heavy} and {self.recent}",
                expected="shares that sum to 1 at most",
            )  # fmt: skip
        if not self.open or not self.close:
            raise InputError("spans need markers", got=f"open {self.open}, close {self.close}")


def at(budget: float) -> dict[str, Any]:
    return {"heavy": budget / 2, "recent": budget / 2}


def calibrate(context: Context, options: Options) -> Decision:
    model = context.running
    markers = {
        name: tuple(chain.from_iterable(spellings(model, text) for text in getattr(options, name)))
        for name in ("open", "close")
    }
    keep = thinned(
        context, options.heavy + options.recent, observe="all", reduce="sum", score="outside", spread="outside",
        recent=options.recent, merge=MERGES[options.merge], threshold=-2.0,
        weigh="cosine" if options.merge == "weighted" else "equal", settings=markers,
    )  # fmt: skip
    return Decision(keep)
