"""A plan is data: what a method decided, in four slots that follow the life of a cache entry.

    keep   which entries stay                store  how an entry is encoded
    read   which entries a query touches     draft  whether the cache only proposes

The vocabulary of the slots is in `slots.py`. A slot that is None is lossless. Every plan carries its evidence (the
scores that led to it), the fingerprint of the model it was made for, and how it was made. It knows no method by name
and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvtool import files, records
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
    conflicts(made)
    return made


def conflicts(plan: Plan) -> None:
    """Raise InputError when the slots of a plan contradict one another."""
    if plan.store is None:
        return
    keep, store = plan.keep, plan.store
    store.check(plan.model["kv_heads"], plan.model["head_dim"])
    if store.span > 1 and plan.slots["read"]:
        raise InputError(
            "layers that are written as one cannot each choose what they read",
            remedy="compose with a plan that reads everything, or stores layers apart",
        )
    if store.span > 1:
        whole = torch.tensor([window is None for window in plan.model["windows"]])
        if keep is not None:
            whole &= keep.full.all(1) & (keep.select is None)
        broken = ((store.index >= 0).any(1) & ~whole).nonzero().flatten().tolist()
        if broken:
            raise InputError(
                f"layers are written as one across heads, but heads of layer {broken[0]} drop entries of their own",
                remedy="compose with a plan that keeps every entry, or stores layers apart",
            )
    if keep is None:
        return
    layers, _ = store.index.shape
    for layer in range(layers):
        for number in store.index[layer].unique().tolist():
            if number < 0:
                continue
            for side, encoding in (("keys", store.keys[number]), ("values", store.values[number])):
                if encoding.joined > 1 and keep.ragged(layer):
                    raise InputError(
                        f"layer {layer}: {side} are stored across heads, but each head keeps entries of its own",
                        remedy="compose with a plan that keeps the same entries in every head, or stores heads apart",
                    )
    if keep.select is not None and keep.select.when == "step" and plan.slots["store"]:
        raise InputError(
            "entries are evicted one by one at every step, but they are stored in blocks that are never written again",
            remedy="compose with a plan that evicts once, after the prompt",
        )


def _names(plans: tuple[Plan, ...]) -> list[str]:
    """Method names, made distinct."""
    names: list[str] = []
    for plan in plans:
        count = sum(name.split(" (")[0] == plan.method for name in names)
        names.append(plan.method if not count else f"{plan.method} ({count + 1})")
    return names
