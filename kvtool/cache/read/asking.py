"""The query that chooses, where it is not the step's own: made of the last `Read.asked` queries.

    together  their mean, of those that came together with others, as a prompt or a question does: what is decoded
              afterwards has no say, and a choice is made anew after each such chunk (ReKV, arXiv 2503.00540). Chunks
              without a step between them are one prompt, unless its end was told (`SegmentCache.finish`)
    probe     Σ_t w_t q_t,  w_t = φ_t / Σ φ,  φ_t = mean over channels c of (q_tc − μ_c)² / (σ²_c + mean(σ²) / 100):
              the more a token's queries differ from what is usual, the more they say (ActQKV, arXiv 2502.13542)

φ goes over the channels of all query heads of the lane together. What is usual, μ and σ², is the plan's (`Read.usual`),
or that of all queries that the lane has seen so far. With `Read.bare` queries are taken before RoPE. Under the protocol
`strict` nothing comes together, and the newest queries are those that any token's choice is made by.

Shapes: B batch, K KV heads of the lane, G query heads of each, N queries, T new ones, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvtool import registry
from kvtool.cache.lane import Step
from kvtool.cache.read.places import Places
from kvtool.slots import Read
from kvtool_kernels.precision import wide

STATE = ("held", "total", "square")
FLOOR = 1e-12  # of a variance


@dataclass(frozen=True)
class Usual:
    """Mean and variance of queries by channel, [K,G,D], as the plan has them."""

    mean: torch.Tensor
    variance: torch.Tensor


class Asking:
    """State is replaced, never written into. usual [K,G,2,D]: mean and variance by channel."""

    def __init__(self, spec: Read, usual: torch.Tensor | None, places: Places):
        self.by, self.count, self.bare, self.places = spec.query, spec.asked, spec.bare, places
        self.usual = None if usual is None else Usual(*usual.unbind(-2))
        self.held: torch.Tensor | None = None  # the queries that choose [B,K,G,N,D]
        self.alone = True  # did the newest token come alone, or end a prompt?
        self.fresh = False  # have tokens come together since a choice was made?
        self.seen = 0  # queries of `total` and `square`, sums fp64 [B,K,G,D], where the usual is theirs
        self.total: torch.Tensor | None = None
        self.square: torch.Tensor | None = None

    def receive(self, q: torch.Tensor | None, k: torch.Tensor, step: Step) -> None:
        """Entries with keys k [B,K,T,D] have come, and q [B,H,≤T,D] are the queries of the last of them."""
        together = not step.strict and (k.shape[2] > 1 or step.start == 0)
        new = together and self.alone
        self.alone, self.fresh = not together, self.fresh or (together and self.by == "together")
        asks = self.by == "probe" or (self.by == "together" and (together or (step.strict and not step.decoded)))
        if q is None or not asks:
            return
        q = q.unflatten(1, (k.shape[1], -1))
        counts = self.by == "probe" and self.usual is None
        q = q if counts else q[:, :, :, -self.count :]
        if self.bare:
            first = step.start + step.origin
            q = self.places.bare(q, torch.arange(first + k.shape[2] - q.shape[3], first + k.shape[2]))
        if counts:
            self._count(wide(q))
        kept = None if new and self.by == "together" else self.held
        held = q if kept is None else torch.cat([kept, q], 3)
        self.held = held[:, :, :, -self.count :].clone()

    def _count(self, q: torch.Tensor) -> None:
        total, square = (x.sum(3, dtype=torch.float64) for x in (q, q.square()))
        self.total = total if self.total is None else self.total + total
        self.square = square if self.square is None else self.square + square
        self.seen += q.shape[3]

    def query(self, q: torch.Tensor, step: Step) -> torch.Tensor:
        """What chooses [B,K,G,D] at a step whose own query is q [B,K,G,D]."""
        if self.held is not None:
            return wide(self.held).mean(3) if self.by == "together" else self._probe(wide(self.held))
        own = torch.tensor([step.start + step.origin])
        return self.places.bare(q[..., None, :], own)[..., 0, :] if self.bare else q

    def _probe(self, q: torch.Tensor) -> torch.Tensor:
        if self.usual is not None:
            mean, variance = (x.to(q) for x in (self.usual.mean, self.usual.variance))
        else:
            assert self.total is not None
            assert self.square is not None
            mean = self.total / self.seen
            variance = (self.square / self.seen - mean.square()).clamp_min(0).to(q)
            mean = mean.to(q)
        return (weights(q, mean, variance)[:, None, None, :, None] * q).sum(3)

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from (held for name in STATE if (held := getattr(self, name)) is not None)

    def reorder(self, rows: torch.Tensor) -> None:
        for name in STATE:
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[rows])


def weights(q: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """q [B,K,G,N,D], mean and variance [(B,)K,G,D] → φ as shares of its sum, [B,N]."""
    least = variance.mean((-3, -2, -1), keepdim=True) / 100
    apart = (q - mean[..., None, :]).square() / (variance + least).clamp_min(FLOOR)[..., None, :]
    phi = apart.mean((1, 2, 4)) + FLOOR  # where nothing differs all say the same
    return phi / phi.sum(-1, keepdim=True)


def recorded(read: Read) -> int:
    """How many of a prompt's newest queries a reading looks at; −1 all."""
    rule = registry.module("cache/read/summaries", read.summary, "summary")
    if read.index is not None and registry.module("cache/read/indexes", read.index, "index").QUERIES:
        return -1
    if hasattr(rule, "CREDITS") or (read.query == "probe" and read.usual is None):
        return -1
    return read.asked if read.query in ("together", "probe") else 0
