"""A plan is data: what a method decided, in four slots that follow the life of a cache entry.

    keep   which entries stay                store  how an entry is encoded
    read   which entries a query touches     draft  whether the cache only proposes

The vocabulary of the slots is in `slots/`. A slot that is None is lossless. Every plan carries its evidence (the
scores that led to it), the fingerprint of the model it was made for, and how it was made. It knows no method by name
and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvtool import conflicts, files, records
from kvtool.encoding import fitted  # noqa: F401  kinds that a plan may hold, though no slot names them
from kvtool.errors import InputError
from kvtool.slots import Draft, Keep, Read, Store

SCHEMA = 2
SLOTS = ("keep", "store", "read", "draft")


@dataclass(frozen=True)
class Plan:
    """One calibration artifact. `model` is the fingerprint; `evidence` holds the arrays behind the decision."""

    method: str
    model: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    keep: Keep | None = None
    evidence: dict[str, torch.Tensor] = field(default_factory=dict)
    store: Store | None = None
    read: Read | None = None
    draft: Draft | None = None

    @property
    def slots(self) -> dict[str, bool]:
        """Slot name → is it filled with something that changes what the cache holds, reads or answers?"""
        filled = {name: getattr(self, name) for name in SLOTS}
        return {name: slot is not None and not slot.lossless for name, slot in filled.items()}

    @property
    def dense(self) -> bool:
        """Does every layer see a prompt that is fed at once whole?"""
        return not self.at_once and (self.keep is None or not bool(self.keep.gone.any()))

    @property
    def at_once(self) -> bool:
        """Is a prompt to be fed at once, since what is read of it, or how far its tokens go, hangs on all of it?"""
        going = self.keep is not None and self.keep.leaving
        return going or (self.read is not None and self.read.sparse)

    @property
    def foretold(self) -> bool:
        """Must a cache be told what follows the prompt?"""
        return self.keep is not None and self.keep.select is not None and self.keep.select.observe == "answer"

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
        tensors = {f"evidence.{name}": array for name, array in self.evidence.items()}
        header = {
            "kind": "plan",
            "schema": SCHEMA,
            "method": self.method,
            "options": self.options,
            "model": self.model,
            "provenance": self.provenance,
            "slots": {name: records.dump(getattr(self, name), name, tensors) for name in SLOTS},
        }
        return files.write(path, header, tensors, force=force)


def read(path: str) -> Plan:
    """Read a plan; raises InputError for anything that is not a whole plan of this schema."""
    header, tensors = files.read(path, kind="plan", schema=SCHEMA)
    try:
        slots = {name: records.load(header["slots"][name], tensors) for name in SLOTS}
        for name, kind in zip(SLOTS, (Keep, Store, Read, Draft), strict=True):
            if not isinstance(slots[name], kind | None):
                raise TypeError(f"proper {name}")
        evidence = {
            name.removeprefix("evidence."): array for name, array in tensors.items() if name.startswith("evidence.")
        }
        return Plan(
            header["method"], header["model"], header["options"], header["provenance"], evidence=evidence, **slots
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is a damaged plan", got=f"no {error}") from error


def compose(*plans: Plan) -> Plan:
    """One plan with the filled slots of all; raises InputError when two fill the same slot or cannot live together."""
    first = plans[0]
    for other in plans[1:]:
        other.check(first.model)
    owners: dict[str, Plan] = {}
    for plan in plans:
        for slot in (slot for slot, filled in plan.slots.items() if filled):
            if slot == "store" and slot in owners:
                assert plan.store is not None
                stored = owners[slot].store
                assert stored is not None
                owners[slot] = replace(owners[slot], store=stored.then(plan.store))
                continue
            if slot == "keep" and slot in owners:
                assert plan.keep is not None
                kept = owners[slot].keep
                assert kept is not None
                if (both := kept.then(plan.keep)) is not None:
                    owners[slot] = replace(owners[slot], keep=both)
                    continue
            if slot == "read" and slot in owners:
                assert plan.read is not None
                chosen = owners[slot].read
                assert chosen is not None
                if (joined := chosen.then(plan.read)) is not None:
                    owners[slot] = replace(owners[slot], read=joined)
                    continue
            if slot in owners:
                raise InputError(
                    f"two plans fill the slot {slot!r}", got=f"{owners[slot].method} and {plan.method}",
                    remedy="compose plans that fill different slots",
                )  # fmt: skip
            owners[slot] = plan
    lossy = [plan for plan in plans if any(plan.slots.values())]
    names = _names(plans)
    made = replace(
        first,
        method=" + ".join(plan.method for plan in lossy) or first.method,
        options={name: plan.options for name, plan in zip(names, plans, strict=True)},
        provenance={"composed": [plan.provenance for plan in plans]},
        evidence={
            f"{name}.{key}": array
            for name, plan in zip(names, plans, strict=True)
            for key, array in plan.evidence.items()
        },
        **{slot: getattr(owners.get(slot, first), slot) for slot in SLOTS},
    )
    conflicts.check(made)
    return made


def _names(plans: tuple[Plan, ...]) -> list[str]:
    """Method names, made distinct."""
    names: list[str] = []
    for plan in plans:
        count = sum(name.split(" (")[0] == plan.method for name in names)
        names.append(plan.method if not count else f"{plan.method} ({count + 1})")
    return names
