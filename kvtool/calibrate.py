"""From a trace or a model to a plan, by any method: supplies what the method's file asks for and records how the
plan was made.

It knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvtool import __version__, conflicts, files, options, records, registry
from kvtool.errors import InputError
from kvtool.methods._base import Context
from kvtool.model import Model
from kvtool.plan import SLOTS, Plan
from kvtool.trace import Trace, geometry


def method(name: str) -> Any:
    """The module of one method; raises InputError with a suggestion."""
    return registry.module("methods", name, "method")


def reads(module: Any, chosen: Any) -> tuple[str, ...]:
    """The statistics that a method's module reads under its options `chosen`."""
    found: tuple[str, ...] = module.reads(chosen) if hasattr(module, "reads") else module.STATISTICS
    return found


def calibrate(
    name: str,
    settings: dict[str, Any],
    *,
    model: Model | None = None,
    trace: Trace | None = None,
    load: Callable[[], Model] | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    state: Path | None = None,
) -> Plan:
    """`settings`: option name → text or value. `state`: file that keeps an interrupted calibration; it resumes
    from it when the method, options, seed and model are the same, and is removed at the end. `load` gives the model of
    the trace, to those methods that run it under these options.

    Raises InputError for an unknown option, a trace that lacks a statistic, or a model that the trace is not of.
    """
    module, name = method(name), registry.spelled(name)
    chosen = options.build(module.Options, settings, name)
    needed = reads(module, chosen)
    if needed:
        if trace is None:
            raise InputError(f"{name} reads a trace", expected=f"one with {', '.join(needed)}")
        trace.need(*needed)
    if module.MODEL and model is None:
        if load is None:
            raise InputError(f"{name} runs the model", remedy="pass the model, or a trace that names it")
        model = load()
    if model is not None:
        _same(model, trace)
    fingerprint = model.fingerprint if model is not None else trace.model if trace is not None else None
    if fingerprint is None:
        raise InputError("nothing to calibrate on", expected="a model or a trace")
    identity = files.digest(
        name, repr(sorted(options.record(chosen).items())), str(seed), repr(sorted(fingerprint.items()))
    )
    context = Context(
        geometry(fingerprint), model, trace, seed, progress, _resume(state, identity), _checkpoint(state, identity),
        None if load is None else lambda: _same(load(), trace),
    )  # fmt: skip
    decision = module.calibrate(context, chosen)
    if state is not None:
        state.unlink(missing_ok=True)
    broken = [key for key, array in decision.evidence.items() if not bool(torch.isfinite(array).all())]
    if broken:
        raise InputError(f"{name} found NaN in {broken[0]!r}", remedy="is the trace or the model damaged?")
    provenance = {
        "kvtool": __version__,
        "torch": torch.__version__.split("+")[0],
        "seed": seed,
        "corpora": trace.corpora if trace is not None else {},
        "facts": decision.facts,
    }
    slots = {slot: records.settled(getattr(decision, slot)) for slot in SLOTS}
    made = Plan(name, fingerprint, options.record(chosen), provenance, evidence=decision.evidence, **slots)
    conflicts.check(made)
    return made


def _same(model: Model, trace: Trace | None) -> Model:
    """The model; raises InputError when the trace is of another."""
    if trace is not None and trace.model != model.fingerprint:
        raise InputError("the trace is of another model", remedy=f"profile {model.name} again")
    return model


def _checkpoint(state: Path | None, identity: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def keep(tensors: dict[str, torch.Tensor]) -> None:
        if state is not None:
            header = {"kind": "checkpoint", "schema": 1, "identity": identity}
            files.write(state, header, {key: tensor.clone() for key, tensor in tensors.items()}, force=True)

    return keep


def _resume(state: Path | None, identity: str) -> dict[str, torch.Tensor]:
    if state is None or not state.exists():
        return {}
    header, tensors = files.read(state, kind="checkpoint", schema=1)
    return tensors if header["identity"] == identity else {}
