"""Spans of a prompt that markers set off, such as <image> … </image>, told by token ids.

    depth ← max(0, depth + opens − closes), token by token; a token of depth > 0 lies inside

Spans may lie in one another. A close without an open is ignored, a span that is not closed yet runs to the end. Where
open and close are the same marker, every second one closes. A marker is a tuple of token ids, and may have several
spellings, since tokenizers join a marker's ends to what stands beside it: `spellings` knows the marker alone and after
a space or a line's end, not what follows it. Markers that are tokens of their own, or stand on lines of their own, are
safe. Spellings must not overlap one another in a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtool.errors import InputError
from kvtool.model import Model

Marker = Sequence[Sequence[int]]  # its spellings


def spellings(model: Model, text: str) -> tuple[tuple[int, ...], ...]:
    """The token ids that a marker may have in a prompt, longest first."""
    if not text.strip():
        raise InputError("an empty marker", expected="the text that opens or closes a span")
    found = {tuple(model.ids(text).tolist())}
    for before in (" ", "\n"):
        alone, joined = model.ids(before).tolist(), model.ids(before + text).tolist()
        if joined[: len(alone)] == alone:
            joined = joined[len(alone) :]
        found.add(tuple(joined))
    return tuple(sorted(found, key=lambda ids: (-len(ids), ids)))


def numbered(
    tokens: torch.Tensor, opening: Marker, closing: Marker, *, markers: bool = True, unclosed: bool = True
) -> torch.Tensor:
    """int64 like tokens [...,S]: 0 outside, n in the n-th outermost span.

    markers: a span's own markers lie inside. unclosed: so does what follows an open that has no close yet.
    """
    first, last = _occurrences(tokens, opening)
    close_first, close_last = _occurrences(tokens, closing)
    if {tuple(s) for s in opening} == {tuple(s) for s in closing}:
        first, last, close_first, close_last = _in_turn(first, last)
    steps = torch.zeros(*tokens.shape[:-1], 2 * tokens.shape[-1] + 2, dtype=torch.int64, device=tokens.device)
    own, after = steps[..., 1:-1:2], steps[..., 2::2]  # what changes with a token, and what changes behind it
    if markers:
        own += first
        after -= close_last.long()
    else:
        own -= close_first.long()
        after += last
    total = steps.cumsum(-1)
    depth = total - total.cummin(-1).values.clamp_max(0)
    before = torch.nn.functional.pad(depth[..., :-1], (1, 0))
    number = ((depth > 0) & (before == 0)).cumsum(-1)
    within = depth[..., 1:-1:2] > 0
    found = number[..., 1:-1:2] * within
    if not unclosed:
        found = found.masked_fill((found == number[..., -2:-1]) & (depth[..., -2:-1] > 0), 0)
    return found


def inside(
    tokens: torch.Tensor, opening: Marker, closing: Marker, *, markers: bool = True, unclosed: bool = True
) -> torch.Tensor:
    """bool like tokens [...,S]: which of them lie in a span; options as in `numbered`."""
    return numbered(tokens, opening, closing, markers=markers, unclosed=unclosed) > 0


def _occurrences(tokens: torch.Tensor, marker: Marker) -> tuple[torch.Tensor, torch.Tensor]:
    """bool like tokens [...,S]: where the marker begins, and where it ends."""
    count = tokens.shape[-1]
    first = torch.zeros_like(tokens, dtype=torch.bool)
    last = first.clone()
    for spelling in marker:
        size = len(spelling)
        if not 0 < size <= count:
            continue
        ids = torch.tensor(list(spelling), device=tokens.device)
        hit = (tokens.unfold(-1, size, 1) == ids).all(-1)
        first[..., : count - size + 1] |= hit
        last[..., size - 1 :] |= hit
    return first, last


def _in_turn(first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A marker that opens and closes by turns: where opens begin and end, where closes do."""
    opens, ends = first.cumsum(-1) % 2 == 1, last.cumsum(-1) % 2 == 1
    return first & opens, last & ends, first & ~opens, last & ~ends
