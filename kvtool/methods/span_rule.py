"""Span rule: what stands between two markers goes as soon as it is over, the newest spans apart.

After TIM (Luo et al., arXiv 2507.16784), whose model writes its work as a tree and drops the steps of a subtask that
is finished.

    a span runs from an `opening` to the `closing` marker that belongs to it;   the newest `buffer` closed spans stay
    memory 2·b·d·L·K·(t − tokens of the older ones)

The rule alone: it looks at token ids, in the prompt and at every decode step, and drops the same entries in all heads.
No model was trained to live with it here, and TIM's runtime was not read: the buffer of 2, the stack of finished lists
and what follows them are from a description by others (card C19). TIM encodes what follows a dropped span again, so
that nothing of it remains and positions close up. `position=reencode` does: the m tokens behind the first dropped one
are fed again over what stands before it, a prefill of m tokens whenever a span goes. `reindex` closes positions up by
turning keys, `original` leaves the gap; under both, entries behind a span were computed while it was there, and know of
it.

Spans inside one another go together. With `markers` a span goes one token later: the newest entry always stays, and a
marker by itself would mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.cache.keep.spans import spellings
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = True


@dataclass(frozen=True)
class Options:
    """opening, closing: markers that a span lies between, several where there are several kinds. buffer: newest closed
    spans that stay. markers: a span's markers go with it. position: original, reindex to close up the gap, or reencode
    to feed what stands behind it again."""

    opening: tuple[str, ...] = ("<think>",)
    closing: tuple[str, ...] = ("</think>",)
    buffer: int = 2
    markers: bool = False
    position: Literal["original", "reindex", "reencode"] = "original"

    def __post_init__(self) -> None:
        at_least(0, self, "buffer")


def calibrate(context: Context, options: Options) -> Decision:
    if context.model is None or context.model.tokenizer is None:
        raise InputError("span-rule tells markers by their tokens", remedy="pass a model with its tokenizer")
    model = context.model
    settings: dict[str, Any] = {"buffer": options.buffer, "markers": options.markers}
    for name in ("opening", "closing"):
        settings[name] = tuple(ids for marker in getattr(options, name) for ids in spellings(model, marker))
    keep = thinned(
        context, 1.0, score="closed-spans", pick="positive", alike=True, when="step", settings=settings,
        position=options.position,
    )  # fmt: skip
    return Decision(keep)
