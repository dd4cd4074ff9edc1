"""ReKV, in text form: a question fetches the blocks or documents that it is about, once, and they become its context.

Di et al., arXiv 2503.00540, ICLR 2025, for video: a block there is a frame.

    a block is `unit` tokens, or a document, which ends with a blank line;   k̄_u = the mean of its keys before RoPE
    q̄ = the mean of the question's queries before RoPE: those of the prompt's last `asked` tokens
    once, where the question ends, in each layer:   score_u = Σ over all query heads h of q̄_h · k̄_u,   read the best
    then: [ sinks | what was retrieved, in order | question, answer ], the same until the next question

A question is what comes in one piece: after each prompt or chunk that is fed, the next decode step chooses anew. One
that is asked after the prompt's end was told is a chunk of its own. What leaves the recent entries while an answer is
written is read too.

`positions=contiguous` is the paper's: what is read gets fresh positions side by side, so that no distance says how much
was left out. `positions=original` leaves entries where they are, and composes with plans that drop entries, which the
other does not.

Where we depart from the released code (Becomebright/ReKV, 63793f7; card C11): it reads the stream itself through a
window of 15,000 tokens and the first ones; here a prompt is read whole. It reads the question once more on top of what
was retrieved; here the question has seen all. One vector of all heads stands for a block there, with KV heads repeated;
a sum over heads is the same product. Frames hold 196 tokens, and 64 of them are read. Its similarity, called a cosine,
is a product that is not normalised, as here. `period` is ours: in a long answer what is read may be chosen anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.methods._marks import ending
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that are retrieved, a share of all when at most 1, else a count. blocks: what is retrieved as
    one: tokens in equal numbers, or documents. unit: tokens of a block. marks: what ends a document, besides a blank
    line. asked: last tokens of a prompt that are its question. period: steps of an answer after which is chosen anew;
    0 never. positions: where what is read stands: side by side, or at its own distance. heads: whether all heads of a
    layer choose together, or those of a KV head, and how; or each by itself. dense: first layers that read everything.
    sink, recent: entries that are always read. slow: the others live in host memory."""

    budget: float = 0.1
    blocks: Literal["tokens", "documents"] = "tokens"
    unit: int = 16
    marks: tuple[str, ...] = ()
    asked: int = 16
    period: int = 0
    positions: Literal["original", "contiguous"] = "original"
    heads: Literal["layer", "max", "mean", "each"] = "layer"
    dense: int = 0
    sink: int = 16
    recent: int = 64
    slow: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, "unit", "asked")
        at_least(0, self, "period", "dense", "sink", "recent")
        if self.budget <= 0:
            raise InputError("bad option budget", got=self.budget, expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    budget = torch.full((context.geometry.layers,), options.budget)
    budget[: options.dense] = 1.0
    units: dict[str, Any] = dict(unit=options.unit)
    if options.blocks == "documents":
        units = dict(unit=1, form="run", cut="tokens", ends=_ends(context, options.marks))
    read = Read(
        budget, **units, summary="mean", query="together", asked=options.asked, period=options.period, bare=True,
        heads=options.heads, positions=options.positions, sink=options.sink, recent=options.recent, slow=options.slow,
    )  # fmt: skip
    return Decision(read=read)


def _ends(context: Context, marks: tuple[str, ...]) -> torch.Tensor:
    """The tokens that end a document, int32 [n]."""
    return ending(context.running, "document", lambda text: any(mark in text for mark in ("\n\n", *marks)), marks)
