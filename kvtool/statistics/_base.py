"""What a statistic is: a zero, observations, and a merge that is associative and commutative.

A statistic is a set of named accumulators, each with a rule: "sum" (fp64 or int64), "min" or "max". Merging two
is merging each accumulator by its rule, so a trace of A and B is the merge of the traces of A and of B. A
statistic overrides the observations it needs; the profiler computes only what some statistic asks for.

Shapes: L layers, H query heads, K KV heads, T tokens, D head dim. All observations are of one sequence (no batch,
no padding).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch.nn.functional import cosine_similarity

from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.model import Geometry, Model
from kvtool.rotary import Rotary, Table
from kvtool_kernels.attend.reference import logits
from kvtool_kernels.attention_statistics.reference import Summary

Rule = Literal["sum", "min", "max"]


@dataclass(frozen=True)
class States:
    """Queries, keys and values of one layer for a whole sequence, post-RoPE: q [H,T,D], k and v [K,T,D].

    weight fp32 [T], of mean 1: how much each token counts as a key or value (see `_weights.py`); None: all alike.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None
    rotary: Rotary
    table: Table | None
    sample: Sample
    weight: torch.Tensor | None = None

    @cached_property
    def k_pre(self) -> torch.Tensor:
        """Keys before RoPE [K,T,D], by exact inverse rotation."""
        return self.rotary.unrotate(self.k, self.table)

    def logits(self, first: int, end: int | None = None, keys: int | None = None) -> torch.Tensor:
        """Capped logits of the rows from `first` to before `end` with the first `keys` entries, fp32 [K,G,R,S]; None:
        to the last. What rows cannot see is not hidden, and learned sinks are left out."""
        q, k = self.q[None, :, first:end], self.k[None, :, :keys]
        return logits(q.float(), k.float(), scale=self.scale, softcap=self.softcap)[0].unflatten(0, (len(self.k), -1))


@dataclass(frozen=True)
class Rows:
    """One layer's attention over a whole sequence, already summed: see `kvtool_kernels.attention_statistics`."""

    layer: int
    summary: Summary
    first: int  # rows from which `summary.distance` counts
    sample: Sample


@dataclass(frozen=True)
class Stream:
    """The residual stream before and after a part of one layer (its attention, or all of it), [T,hidden] each."""

    layer: int
    before: torch.Tensor
    after: torch.Tensor


@dataclass(frozen=True)
class Copying:
    """One decode step of a needle prompt: attention of the last row per layer [L,H,S], and the token that this
    step generated."""

    attention: torch.Tensor
    generated: int
    prompt: torch.Tensor


class Observations:
    """What a statistic may observe; each does nothing until it is overridden."""

    def begin(self, sample: Sample) -> None:
        """A sequence starts."""

    def states(self, view: States) -> None:
        """Queries, keys and values of one layer."""

    def rows(self, view: Rows) -> None:
        """Summed attention of one layer."""

    def attended(self, view: Stream) -> None:
        """Residual stream around one layer's attention."""

    def stream(self, view: Stream) -> None:
        """Residual stream around one layer."""

    def step(self, view: Copying) -> None:
        """One decode step."""

    def end(self, sample: Sample, answer: torch.Tensor | None) -> None:
        """The sequence is over; `answer` holds the generated tokens when there was a decode."""


class Statistic(Observations, ABC):
    """Base of all statistics. Subclasses set `corpus`, implement `zero`, and override some of the observations."""

    corpus: ClassVar[str] = "text"  # which corpus it observes
    default: ClassVar[bool] = True  # whether a plain `profile` takes it

    def __init__(self, model: Model | None, geometry: Geometry):
        self.geometry = geometry
        self.model = model
        self.rules: dict[str, Rule] = {}
        self.state: dict[str, torch.Tensor] = {}
        self.zero()

    @abstractmethod
    def zero(self) -> None:
        """Create the accumulators with `add`."""

    def add(self, name: str, *shape: int, rule: Rule = "sum", dtype: torch.dtype = torch.float64) -> None:
        """A new accumulator at its neutral element."""
        neutral = {"sum": 0.0, "min": float("inf"), "max": float("-inf")}[rule]
        device = self.model.device if self.model is not None else "cpu"
        self.rules[name], self.state[name] = rule, torch.full(shape, neutral, dtype=dtype, device=device)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.state[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self.state[name] = value

    @classmethod
    def observes(cls, what: str) -> bool:
        """Does this statistic override the observation `what`?"""
        return getattr(cls, what) is not getattr(Observations, what)

    def merge(self, other: Statistic) -> None:
        """Fold `other` into this one; raises InputError when the shapes differ."""
        for name, rule in self.rules.items():
            mine = self.state[name]
            theirs = other.state[name].to(mine.device)
            if mine.shape != theirs.shape:
                raise InputError(f"{name} differs in shape", got=tuple(theirs.shape), expected=tuple(mine.shape))
            if rule == "sum":
                mine += theirs
            else:
                self.state[name] = torch.minimum(mine, theirs) if rule == "min" else torch.maximum(mine, theirs)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the trace stores."""
        return {name: tensor.cpu() for name, tensor in self.state.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`; raises InputError when one is missing."""
        missing = sorted(set(self.rules) - set(tensors))
        if missing:
            raise InputError("a statistic of the trace is damaged", got=f"no {missing[0]!r}")
        for name in self.rules:
            if tensors[name].shape != self.state[name].shape:
                raise InputError("a statistic of the trace is damaged", got=f"{name} of another shape")
        self.state = {name: tensors[name].clone() for name in self.rules}


SLICE = 512  # tokens that are looked at together where a whole sequence would need large temporaries


def cosines(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Σ_t w_t·cos(x_t, y_t), [..., T, C] twice and [T] → fp64 [...]"""
    parts = zip(x.split(SLICE, -2), y.split(SLICE, -2), strict=True)
    each = torch.cat([cosine_similarity(mine.float(), theirs.float(), dim=-1).double() for mine, theirs in parts], -1)
    return (each if weight is None else each * weight).sum(-1)


def weighted(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Σ over tokens of x [..., T, C] times their weights [T] is the sum of what this gives."""
    return x if weight is None else x * weight[:, None]


# Distances and positions are binned by half octaves, exact below 16: 0, 1, …, 15, 16–22, 23–31, 32–45, …
_EXACT = 16
BINS = _EXACT + 2 * 17  # up to 2^21 tokens


def bin_of(distance: torch.Tensor) -> torch.Tensor:
    """int64 distance or position → bin index."""
    octaves = torch.log2(distance.clamp_min(1).double() / _EXACT + 1e-12)
    return torch.where(distance < _EXACT, distance, (_EXACT + (2 * octaves + 1e-9).floor().long()).clamp_max(BINS - 1))


def bin_edges() -> list[int]:
    """The smallest distance of each bin."""
    distance = torch.arange(1 << 21)
    index = bin_of(distance)
    return torch.searchsorted(index, torch.arange(BINS)).tolist()


def binned(values: torch.Tensor) -> torch.Tensor:
    """[..., N] by distance or position → [..., BINS] fp64 sums."""
    index = bin_of(torch.arange(values.shape[-1]))
    out = torch.zeros(*values.shape[:-1], BINS, dtype=torch.float64)
    return out.index_add_(-1, index, values.double())
