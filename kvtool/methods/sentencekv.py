"""SentenceKV: sentences of the prompt are fetched whole, by what the sentence being written asks for.

Zhu et al., arXiv 2504.00970, COLM 2025.

    once the prompt is in: each KV head keeps `factor` times the budget by SnapKV's score, the rest is dropped for good
    what is kept belongs to the sentence it stood in; k̄_s = the mean key of what is kept of sentence s
    q̄ = the mean query since the running sentence began;   sentences are read by q̄ · k̄_s, best first, to the budget

A sentence ends with a token that is nothing but closing marks, such as `.`, `?"` or `...`, or that has a blank line in
it; such tokens are found by decoding the vocabulary. The first `whole` tokens of a sentence read everything that is
kept, for want of a q̄. What is decoded leaves the window of recent entries for the sentence it stands in.

Where we depart from the released code (zzbright1998/SentenceKV, d6bb131; card C6): entries are kept, and mean keys
held, per KV head, not per query head, which repeats the cache G times. The code finds marks by converting raw strings,
which misses other spellings. It reads everything at a sentence's last token too, and adds decoded entries to the index
only then. `cut=keys` is ours: a sentence then begins where neighbouring keys of a head have a small cosine. The paper
keeps sentences' entries in host memory: `slow`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, odd, thinned
from kvtool.methods._marks import ending
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ()
MODEL = True
CLOSING = " \t\"'”’)]}»"  # what may follow a mark


@dataclass(frozen=True)
class Options:
    """budget: entries that a step reads, a share of the prompt when at most 1, else a count. factor: how many times as
    many are kept; 0 keeps all. cut: what ends a sentence: marks in tokens, or keys that differ. marks: characters that
    end a sentence, besides a blank line. apart: cosine of neighbouring keys below which cut=keys cuts.
    whole: first tokens of a sentence that read everything. sink, recent: entries that are always read. window: last
    queries that score the prompt. kernel: neighbours that are pooled. heads: how the query heads of a KV head agree, or
    each reads its own. slow: what is kept lives in host memory."""

    budget: float = 0.1
    factor: float = 3.0
    cut: Literal["tokens", "keys"] = "tokens"
    marks: tuple[str, ...] = (".", "!", "?", "…", "。", "！", "？")
    apart: float = 0.5
    whole: int = 1
    sink: int = 32
    recent: int = 32
    window: int = 32
    kernel: int = 7
    heads: Literal["max", "mean", "sum", "each"] = "mean"
    slow: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "recent", "window")
        at_least(0, self, "whole", "sink")
        odd(self.kernel, "kernel")
        if self.budget <= 0 or (self.factor and self.factor < 1):
            raise InputError(
                "bad option",
                got=f"budget {self.budget}, factor {self.factor}",
                expected="a budget, and a factor ≥ 1 or 0",
            )


def at(budget: float) -> dict[str, Any]:
    """What is kept is the budget, less what mean keys, numbers and the slack of buffers take of 2,000 tokens."""
    return {"budget": max(0.2 * budget, budget - 0.06) / 3 if budget < 1 else 1.0}


def calibrate(context: Context, options: Options) -> Decision:
    layers, keep, kept = context.geometry.layers, None, 1.0
    if options.factor:
        kept = options.factor * options.budget
        kept = min(1.0, kept) if options.budget <= 1 else kept
        keep = thinned(
            context, kept, observed=options.window, reduce="sum", pool="max", kernel=options.kernel, sink=options.sink,
            recent=max(options.window, options.recent),
        )  # fmt: skip
    share = min(1.0, options.budget / kept) if options.budget <= 1 else max(1.0, options.budget - _always(options))
    read = Read(
        torch.full((layers,), share), unit=1, form="run", summary="mean", cut=options.cut,
        ends=_ends(context, options.marks) if options.cut == "tokens" else None,
        apart=torch.full((layers,), options.apart) if options.cut == "keys" else None, query="run", heads=options.heads,
        whole=options.whole, sink=options.sink, recent=options.recent, slow=options.slow,
    )  # fmt: skip
    return Decision(keep, read=read)


def _always(options: Options) -> int:
    return options.sink + options.recent


def _ends(context: Context, marks: tuple[str, ...]) -> torch.Tensor:
    """The tokens that end a sentence, int32 [n]."""
    return ending(context.running, "sentence", lambda text: ends(text, marks), marks)


def ends(text: str, marks: tuple[str, ...]) -> bool:
    """Does a token of this text end a sentence?"""
    bare = text.strip(CLOSING).rstrip("\n")
    words = any(c.isalnum() for c in bare[:-1])
    return "\n\n" in text or (not words and any(bare.endswith(mark) for mark in marks))
