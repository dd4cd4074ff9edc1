"""What `parity.py` compares: methods of kvtool, presses of the peer, and with which options they say the same.

The window is 64 and the pool is a mean of 5 wherever the peer's presses have them so. A row that is not `same` shows
how far two readings of one paper are apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from kvtool.calibrate import calibrate
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.trace import Trace


@dataclass(frozen=True)
class Setting:
    """A prompt of so many entries, of which a KV head keeps `kept`; the trace is of other text."""

    model: Model
    trace: Trace
    entries: int
    kept: int


Planner = Callable[[Setting], Plan]


@dataclass(frozen=True)
class Press:
    """A press of the peer, and what is wrapped around it; {} are its defaults."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    wrapper: str | None = None
    wrapper_options: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"

    @property
    def shown(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in {**self.options, **self.wrapper_options}.items())
        return " ".join(part for part in (self.wrapper, self.name, options) if part)


@dataclass(frozen=True)
class Case:
    """One row of the table. same: do both sides say the same?"""

    method: str
    ours: str
    plan: Planner
    press: Press
    same: bool = True


def method(name: str, **options: Any) -> Planner:
    """The plan that a method makes with so many entries as its budget."""
    return lambda at: calibrate(name, {"budget": at.kept, **options}, model=at.model, trace=at.trace)


def streaming(at: Setting) -> Plan:
    return calibrate("streaming", {"sink": 4, "recent": at.kept - 4}, model=at.model)


def heavy(at: Setting) -> Plan:
    return calibrate("h2o", {"heavy": at.kept - at.kept // 2, "recent": at.kept // 2}, model=at.model)


def observed(at: Setting) -> Plan:
    """H2O as the peer reads it: an entry's mean over the queries that see it, and nothing that is sure to stay."""
    return _changed(calibrate("h2o", {"heavy": at.kept, "recent": 0}, model=at.model), reduce="mean")


def sloped(at: Setting) -> Plan:
    """PyramidKV's budgets as the peer reads them: a line of mean `kept` with the window inside; equal budgets where the
    last layer would have no room for more than the window."""
    least, most = at.kept / 20, 2 * at.kept - at.kept / 20
    if most >= at.entries - 64:
        least, most = 2 * at.kept - at.entries + 64, at.entries - 64
    plan = method("snapkv", **SNAP)(at)
    if not at.entries >= most >= least >= 64:
        return plan
    layers = at.model.geometry.layers
    assert plan.keep is not None
    assert plan.keep.select is not None
    budget = plan.keep.select.budget.clone()
    for layer in range(layers):
        budget[layer] = round(most - layer * (most - least) / (layers - 1))
    return _changed(plan, budget=budget)


def _changed(plan: Plan, **fields: Any) -> Plan:
    """The plan with other fields in its selection."""
    assert plan.keep is not None
    assert plan.keep.select is not None
    return replace(plan, keep=replace(plan.keep, select=replace(plan.keep.select, **fields)))


SNAP: dict[str, Any] = dict(window=64, kernel=5, pool="mean")
FLAT = Press("SnapKVPress", wrapper="AdaKVPress", wrapper_options={"alpha_safeguard": 0.0})
FLOORED = replace(FLAT, wrapper_options={})
OBSERVED = Press("ObservedAttentionPress", attention="eager")
CASES = [
    Case("streaming", "sink=4", streaming, Press("StreamingLLMPress")),
    Case("snapkv", "window=64 pool=mean", method("snapkv", **SNAP), Press("SnapKVPress")),
    Case("snapkv", "its defaults", method("snapkv"), Press("SnapKVPress"), same=False),
    Case("pyramidkv", "snapkv with the peer's budgets", sloped, Press("PyramidKVPress")),
    Case("pyramidkv", "window=64", method("pyramidkv", **SNAP), Press("PyramidKVPress"), same=False),
    Case("adakv", "window=64 kernel=5 pool=mean floor=0", method("adakv", **SNAP, floor=0.0), FLAT),
    Case("adakv", "window=64 kernel=5 pool=mean floor=0", method("adakv", **SNAP, floor=0.0), FLOORED, same=False),
    Case("adakv", "window=64 kernel=5 pool=mean", method("adakv", **SNAP), FLOORED, same=False),
    Case("tova", "its defaults", method("tova"), Press("TOVAPress")),
    Case("keydiff", "its defaults", method("keydiff"), Press("KeyDiffPress")),
    Case(
        "expected-attention", "mode=prompt", method("expected-attention", mode="prompt"),
        Press("ExpectedAttentionPress"),
    ),
    Case(
        "expected-attention", "mode=calibrated", method("expected-attention"), Press("ExpectedAttentionStatsPress")
    ),
    Case("h2o", "its plan with reduce=mean, recent=0", observed, OBSERVED),
    Case("h2o", "half of the budget recent", heavy, OBSERVED, same=False),
]  # fmt: skip
