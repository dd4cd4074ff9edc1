"""A plan is data: what a method decided, in four slots that follow the life of a cache entry.

    keep   which entries stay                store  how an entry is encoded
    read   which entries a query touches     draft  whether the cache only proposes

So far `keep` is: per KV head, everything, or sinks and a recent window, with or without a compensation entry.

A slot that is None is lossless. Every plan carries its evidence (the scores that led to it), the fingerprint of
the model it was made for, and how it was made. It knows no method by name and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from kvtool import files
from kvtool.errors import InputError

SCHEMA = 1
EVERYTHING = -1  # in `Keep.recent`: the head keeps every entry


@dataclass(frozen=True)
class Keep:
    """Sinks and a recent window per KV head.

    sink, recent: int32 [L,K] entries; recent counts the query's own entry; EVERYTHING keeps all.
    compensate: uint8 [L,K]; 1 folds dropped entries into one averaged entry of weight N (RazorAttention, section 3.3).
    recent_ratio: the window is max(recent, recent_ratio · prompt length).
    position: "original", or "reindex" for positions counted inside the cache (StreamingLLM, section 3.2).
    """

    sink: torch.Tensor
    recent: torch.Tensor
    compensate: torch.Tensor
    recent_ratio: float = 0.0
    position: Literal["original", "reindex"] = "original"

    @classmethod
    def heads(cls, full: torch.Tensor, *, sink: int, recent: int, compensate: bool = False, **options: Any) -> Keep:
        """full bool [L,K]: those heads keep everything, the others `sink` + `recent` entries."""
        if sink < 0 or recent < 1:
            raise InputError("bad window", got=f"sink {sink}, recent {recent}", expected="sink >= 0 and recent >= 1")
        full = full.bool()
        return cls(
            sink=torch.where(full, 0, sink).int(),
            recent=torch.where(full, EVERYTHING, recent).int(),
            compensate=(~full & compensate).to(torch.uint8),
            **options,
        )

    @property
    def full(self) -> torch.Tensor:
        """bool [L,K]: heads that keep everything."""
        return self.recent == EVERYTHING

    @property
    def lossless(self) -> bool:
        return bool(self.full.all())


@dataclass(frozen=True)
class Plan:
    """One calibration artifact. `model` is the fingerprint; `evidence` holds the arrays behind the decision."""

    method: str
    model: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    keep: Keep | None = None
    evidence: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def slots(self) -> dict[str, bool]:
        """Slot name → is it filled with something lossy?"""
        return {"keep": self.keep is not None and not self.keep.lossless, "store": False, "read": False, "draft": False}

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raise InputError unless the plan was made for the model with this fingerprint."""
        for key, mine in self.model.items():
            if fingerprint.get(key) != mine:
                raise InputError(
                    "the plan was made for another model",
                    got=f"{key} = {fingerprint.get(key)}",
                    expected=f"{key} = {mine}",
                    remedy="calibrate again on this model",
                )

    def write(self, path: str, *, force: bool = False) -> str:
        """Write the plan; returns the path."""
        keep = self.keep
        header = {
            "kind": "plan",
            "schema": SCHEMA,
            "method": self.method,
            "options": self.options,
            "model": self.model,
            "provenance": self.provenance,
            "slots": {
                "keep": keep and {"recent_ratio": keep.recent_ratio, "position": keep.position},
                "store": None,
                "read": None,
                "draft": None,
            },
        }
        tensors = {f"evidence.{name}": array for name, array in self.evidence.items()}
        if keep is not None:
            tensors |= {"keep.sink": keep.sink, "keep.recent": keep.recent, "keep.compensate": keep.compensate}
        return files.write(path, header, tensors, force=force)


def read(path: str) -> Plan:
    """Read a plan; raises InputError for anything that is not a whole plan of this schema."""
    header, tensors = files.read(path, kind="plan", schema=SCHEMA)
    try:
        slot = header["slots"]["keep"]
        keep = slot and Keep(tensors["keep.sink"], tensors["keep.recent"], tensors["keep.compensate"], **slot)
        return Plan(
            header["method"], header["model"], header["options"], header["provenance"], keep,
            {name.removeprefix("evidence."): array for name, array in tensors.items() if name.startswith("evidence.")},
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is a damaged plan", got=f"no {error}") from error


def compose(first: Plan, second: Plan) -> Plan:
    """One plan with the filled slots of both; raises InputError when both fill the same slot."""
    second.check(first.model)
    clash = [slot for slot, filled in first.slots.items() if filled and second.slots[slot]]
    if clash:
        raise InputError(f"both plans fill the slot {clash[0]!r}", got=f"{first.method} and {second.method}")
    names = [first.method, second.method + (" (2)" if second.method == first.method else "")]
    lossy = [plan for plan in (first, second) if any(plan.slots.values())]
    keeper = next((plan for plan in lossy if plan.slots["keep"]), first)
    return replace(
        first,
        method=" + ".join(plan.method for plan in lossy) or first.method,
        options={names[0]: first.options, names[1]: second.options},
        provenance={"composed": [first.provenance, second.provenance]},
        keep=keeper.keep,
        evidence={
            f"{label}.{name}": array
            for label, plan in zip(names, (first, second), strict=True)
            for name, array in plan.evidence.items()
        },
    )
