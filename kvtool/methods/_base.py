"""What a method file gives: `Options` (a frozen dataclass), `STATISTICS` (what it reads from a trace), `MODEL`
(does it run the model, under all options?), and `calibrate(context, options) -> Decision`. Nothing generic knows a
method by name.

More may be there. `at(budget) -> dict` gives options under which about that share of the full cache's bytes is held,
for prompts of 1,000 tokens or more; a method without it is compared once, under its defaults.
`reads(options)` says which of `STATISTICS` are needed under these options, where not all are.
`REUSE` names the option that takes the path of an earlier plan instead of training, so that all budgets train once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.model import Geometry, Model
from kvtool.slots import Draft, Keep, Read, Select, Store
from kvtool.trace import Trace


@dataclass
class Context:
    """What a method may draw on. `model` and `trace` are there when the method's file asks for them; a model that it
    does not ask for is loaded by `load`, where there is one, as soon as something runs it.

    `progress(done, total, text)` is called after each step of long work. `resume` holds the tensors of an
    interrupted calibration (empty otherwise); `checkpoint(tensors)` keeps such tensors in case this one is
    interrupted.
    """

    geometry: Geometry
    model: Model | None = None
    trace: Trace | None = None
    seed: int = 0
    progress: Callable[[int, int, str], None] = lambda done, total, text: None
    resume: dict[str, torch.Tensor] = field(default_factory=dict)
    checkpoint: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None
    load: Callable[[], Model] | None = None

    @property
    def running(self) -> Model:
        """The model; raises InputError where there is none."""
        if self.model is None and self.load is not None:
            self.model = self.load()
        if self.model is None:
            raise InputError("this calibration runs the model", remedy="pass the model, or a trace that names it")
        return self.model

    @property
    def seen(self) -> Trace:
        """The trace; raises InputError where there is none."""
        if self.trace is None:
            raise InputError("this calibration reads a trace", remedy="make one with kvtool profile --for METHOD")
        return self.trace


@dataclass(frozen=True)
class Decision:
    """A method's outcome: the slots it fills, the arrays behind it, and facts worth recording (JSON-able)."""

    keep: Keep | None = None
    evidence: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    store: Store | None = None
    read: Read | None = None
    draft: Draft | None = None


def thinned(
    context: Context,
    budget: float | torch.Tensor,
    *,
    position: Literal["original", "reindex", "reencode"] = "original",
    **options: Any,
) -> Keep:
    """Scored eviction in every KV head: budget of all heads, or fp32 [L,K]; the other fields of `Select`."""
    shape = (context.geometry.layers, context.geometry.kv_heads)
    if not isinstance(budget, torch.Tensor):
        if not budget > 0:
            raise InputError("bad option budget", got=budget, expected="a share up to 1, or a count of entries")
        budget = torch.full(shape, float(budget))
    everything = torch.ones(shape, dtype=torch.bool)
    return Keep.heads(everything, sink=0, recent=1, select=Select(budget, **options), position=position)


def odd(value: int, name: str) -> int:
    """Check an option that is a width with a middle."""
    if value < 1 or value % 2 == 0:
        raise InputError(f"bad option {name}", got=value, expected="an odd number")
    return value


def per_kv_head(scores: torch.Tensor, kv_heads: int, how: str = "max") -> torch.Tensor:
    """[L,H] → [L,K] by the maximum or mean over each GQA group."""
    grouped = scores.unflatten(1, (kv_heads, -1))
    return grouped.amax(-1) if how == "max" else grouped.mean(-1)


def best(scores: torch.Tensor, count: int, eligible: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """bool mask of the `count` highest of `scores` [L,K] among `eligible` bool [L,K]; ties fall by seeded noise
    far below any score's step."""
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = torch.argsort(noise.flatten())  # a seeded order, then a stable sort by score
    ranked = order[torch.argsort(scores.double().flatten()[order], descending=True, stable=True)]
    ranked = ranked[eligible.flatten()[ranked]][: max(0, count)]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[ranked] = True
    return mask.reshape(scores.shape)


def full_attention(geometry: Geometry) -> torch.Tensor:
    """bool [L,K]: heads of layers without a sliding window of their own; only these are a method's to restrict."""
    return torch.tensor([window is None for window in geometry.windows])[:, None].expand(-1, geometry.kv_heads).clone()


def share(value: float, name: str) -> float:
    """Check an option that is a share."""
    if not 0.0 <= value <= 1.0:
        raise InputError(f"bad option {name}", got=value, expected="a share from 0 to 1")
    return value
