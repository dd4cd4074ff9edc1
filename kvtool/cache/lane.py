"""A lane holds the entries of those KV heads of one layer that share a policy, and attends over them.

Every row of a lane's batch has been fed the same number of tokens: rows with other padding have lanes of their own
(see `segment_cache.py`), so an entry's number is its position, up to a common origin.

Shapes: B batch, K KV heads of this lane, H = K·G their query heads, T tokens of this step, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from kvtool_kernels.precision import wider

if TYPE_CHECKING:
    from kvtool.cache.read.board import Board
    from kvtool.cache.read.chosen import Chosen

Partial = tuple[torch.Tensor, torch.Tensor]


def blank(q: torch.Tensor) -> Partial:
    """The neutral element of the merge for q [B,H,T,D]: what attention to nothing puts out."""
    return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=wider(q.dtype))


@dataclass(frozen=True)
class Step:
    """One call's circumstances. `start`: tokens seen before; `origin`: the position of the first of them that RoPE was
    given; `strict`: compression acts within prefill as it does in decode, so that a prompt's cut makes no difference;
    `decoded`: the tokens are decode steps, even where several come at once.
    `tokens` int64 [B,T]: their ids, where they are known. `chosen`: what queries read of a lane that holds everything,
    where not all of it. `given`: attention over entries that other caches hold too, where it was computed for all.
    `places` int64 [T]: where the queries stand, counted as `start` is, if not one behind the other from there.
    """

    start: int
    scale: float
    softcap: float | None = None
    strict: bool = False
    decoded: bool = False
    origin: int = 0
    tokens: torch.Tensor | None = None
    chosen: Chosen | None = None
    given: Mapping[Any, Partial] = field(default_factory=dict)
    places: torch.Tensor | None = None

    def split(self, pieces: list[int]) -> list[Step]:
        """The circumstances of so many tokens each."""
        starts = [self.start + sum(pieces[:number]) for number in range(len(pieces))]
        each = [None] * len(pieces) if self.tokens is None else self.tokens.split(pieces, 1)
        return [replace(self, start=start, tokens=tokens) for start, tokens in zip(starts, each, strict=True)]

    def end(self, count: int) -> int:
        """Tokens seen once `count` more are."""
        return self.start + count if self.places is None else int(self.places[-1]) + 1

    def positions(self, count: int) -> torch.Tensor:
        """Those of `count` queries, int64 [T]."""
        places = torch.arange(self.start, self.start + count) if self.places is None else self.places
        return places + self.origin

    @property
    def options(self) -> dict[str, Any]:
        """What every call of `attend` is given."""
        return {"scale": self.scale, "softcap": self.softcap}


class Lane(ABC):
    """Entries of the KV heads `heads` (indices within the layer)."""

    def __init__(self, heads: list[int]):
        self.heads = heads
        row = slice(heads[0], heads[-1] + 1, heads[1] - heads[0] if len(heads) > 1 else 1)
        even = row.step > 0 and heads == list(range(row.start, row.stop, row.step))
        self.at = row if even else heads  # of the layer's heads: nothing is copied where they stand in even steps

    @abstractmethod
    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """Attend q [B,H,T,D] over the held entries and the new k, v [B,K,T,D], then keep what the policy keeps."""

    def plain(self, step: Step) -> bool:
        """Is this decode step attention over one pair of tensors, and nothing else? Then `enter`, that attention and
        `leave` are `step`, so that lanes can be attended together."""
        return False

    def enter(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """Take in k, v [B,K,1,D]; all entries that their query sees, k, v [B,K,S,D]."""
        raise AssertionError("no plain lane")

    def leave(self, q: torch.Tensor, step: Step) -> None:
        """q [B,H,1,D] has attended: keep what the policy keeps."""
        raise AssertionError("no plain lane")

    @abstractmethod
    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """Attend q [B,H,T,D] over the held entries and k, v [B,K,N,D] that follow them, the last T of which are the
        queries' own, as if all N had been decoded; but nothing is kept, and nothing is encoded or evicted by score."""

    def renew(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """The newest T tokens come once more: attend q [B,H,T,D] over the entries before theirs and k, v [B,K,T,D],
        which take the place of theirs."""
        raise AssertionError("no lane that is fed again")

    @abstractmethod
    def over(self, q: torch.Tensor, places: torch.Tensor, step: Step) -> Partial:
        """Attend q [B,H,T,D] over the held entries alone, all of which come before the queries: these stand at `places`
        int64 [T], counted as the lane counts its own tokens. Nothing is kept, encoded or evicted."""

    @abstractmethod
    def absorb(self, k: torch.Tensor, v: torch.Tensor, step: Step, q: torch.Tensor | None = None) -> None:
        """Keep what the policy keeps of k, v [B,K,T,D], attending to nothing; q [B,H,T,D] for policies that look at
        the queries of decode steps."""

    @abstractmethod
    def branch(self) -> Lane:
        """A lane that goes on from here and leaves this one alone. What no later token changes is shared between the
        two, and between all rows of the new one."""

    @abstractmethod
    def meet(self, board: Board) -> None:
        """From now on, what the layers of a cache share and tell each other is here."""

    def aside(self) -> Lane:
        """The same entries for one more cache to read: what a lane remembers of those who read it is each one's own."""
        return self

    @abstractmethod
    def recall(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Entries held in order, as attention sees them: k, v [B,K,N,D], and the position of the first."""

    @abstractmethod
    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor held, for the byte ledger."""

    @abstractmethod
    def entries(self) -> int:
        """Entries held per KV head that a query may see."""

    @abstractmethod
    def read_bytes(self) -> int:
        """Bytes of entries that one decode step reads."""

    def slow_bytes(self) -> int:
        """Bytes held in slower memory."""
        return 0

    def moved_bytes(self) -> int:
        """Bytes brought from slower memory so far."""
        return 0

    @abstractmethod
    def reorder(self, rows: torch.Tensor) -> None:
        """Select batch rows (beam search)."""
