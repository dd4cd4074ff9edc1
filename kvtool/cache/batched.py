"""The rows of a batch in one layer of a cache, in parts that are fed alike (see `part.py`).

Rows with equal left padding share a part, unless each row comes to hold entries of its own choice. A row has its part
from its first token on, and stays there when a beam search reorders the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kvtool.cache.lane import Lane
from kvtool.cache.onward import Onward
from kvtool.cache.part import Part
from kvtool.cache.share.contexts import Contexts
from kvtool.errors import InputError
from kvtool.serving import Attention, Layer


class Batched(Layer):
    """Abstract: the parts, and what stands beside them. `columns` counts tokens fed, padding included."""

    def __init__(self, make: Callable[[int], list[Lane]], *, by_row: bool, onward: Onward | None):
        super().__init__()
        self.make, self.by_row = make, by_row  # the lanes of a part, told how many parts there are already
        self.onward = onward  # which of a prompt's tokens reach this layer
        self.parts: list[Part] = []
        self.columns = 0
        self.prefix = 0  # columns that all rows share
        self.inserted: list[torch.Tensor] = []  # k, v [B,K,n,D] of no token
        self.contexts: Contexts | None = None  # what other caches hold, before all that is fed

    def lanes(self) -> Iterator[Lane]:
        """All lanes of all parts."""
        return (lane for part in self.parts for lane in part.lanes)

    @property
    def single(self) -> bool:
        """Is one row held, without padding?"""
        return len(self.parts) == 1 and self.parts[0].rows == [0] and not self.parts[0].padding

    @property
    def place(self) -> int:
        """The position of the token that comes next."""
        if self.parts:
            return self.parts[0].origin + self.columns
        return 0 if self.contexts is None else self.contexts.start

    def get_seq_length(self) -> int:
        return self.columns

    def _admit(self, batch: int, end: int, call: Attention | None = None) -> None:
        """Give rows whose first token has come a part: rows with equal padding share one, unless `by_row`."""
        waiting = [row for row in range(batch) if all(row not in part.rows for part in self.parts)]
        padding, places = [0] * batch, None
        if call is not None and call.padding is not None:
            seen = call.padding.bool()
            if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
                raise InputError("the attention mask hides tokens elsewhere than on the left", remedy="pad on the left")
            padding = (~seen).sum(1).tolist()
        groups: dict[tuple[int, int], list[int]] = {}
        for row in waiting:
            if padding[row] < end:
                groups.setdefault((padding[row], row if self.by_row else 0), []).append(row)
        if call is not None and call.positions is not None:
            places = call.positions.expand(batch, -1)
        first = 0 if self.contexts is None else self.contexts.start
        for (pad, _), rows in groups.items():
            part = Part(rows, pad, self.make(len(self.parts)))
            part.origin = first if places is None else int(places[rows[0], max(0, pad - self.columns)])
            if places is not None and self.onward is not None and self.onward.going is not None:
                part.origin -= int(self.onward.going.places(rows[0], pad)[0])
            if self.contexts is not None and part.origin != self.contexts.start:
                raise InputError(
                    "what follows a prefix or documents does not stand behind them", got=f"position {part.origin}",
                    expected=self.contexts.start, remedy="pass position_ids",
                )  # fmt: skip
            self.parts.append(part)

    def _widen(self, batch: int, call: Attention) -> None:
        """The first tokens after a shared prefix say how many rows go on from it."""
        if call.padding is not None and not bool(call.padding.all()):
            raise InputError("continuations of a shared prefix cannot be padded", remedy="feed equal lengths together")
        if self.columns == self.prefix and len(self.parts[0].rows) == 1:
            self._take(torch.zeros(batch, dtype=torch.long))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take(beam_idx)

    def _take(self, indices: torch.Tensor) -> None:
        """Rows of the batch become these rows of it; a row stays with the part it came from."""
        sources = indices.tolist()
        for part in self.parts:
            rows = [at for at, source in enumerate(sources) if source in part.rows]
            local = torch.tensor([part.rows.index(sources[at]) for at in rows], dtype=torch.long)
            for lane in part.lanes:
                lane.reorder(local)
            part.rows = rows
        self.parts = [part for part in self.parts if part.rows]
        self.inserted = [x[indices] for x in self.inserted]
        if self.by_row and not self.prefix and any(len(part.rows) > 1 for part in self.parts):
            raise InputError(
                "rows of this plan's cache hold different entries and cannot be repeated",
                remedy="use one beam, or a plan whose budget does not depend on the prompt",
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Overwritten entries cannot come back."""
        raise InputError(
            "a segment cache cannot be rolled back", remedy="assisted generation and prompt lookup need the full cache"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(sum(len(part.rows) for part in self.parts)).repeat_interleave(repeats))
