"""The plans that the laws run over: every setting of every method's row (see `rows/`), and one that no method makes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from kvtool.calibrate import calibrate, method
from kvtool.methods._base import full_attention
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.profile import profile
from kvtool.slots import EVERYTHING, Keep
from kvtool.trace import Trace, statistic
from tests import models
from tests.corpora import corpora
from tests.laws.rows import ROWS, Options
from tests.laws.selecting import defined


def plan(name: str, model: Model, settings: Options, *, seed: int = 0) -> Plan:
    """Calibrate one method as the command line does, on tiny corpora."""
    statistics = method(name).STATISTICS
    made = observed(model, statistics) if statistics else None
    return calibrate(name, settings, model=models.with_tokenizer(model), trace=made, seed=seed)


_observed: dict[tuple[Any, tuple[str, ...]], Trace] = {}


def observed(model: Model, statistics: tuple[str, ...]) -> Trace:
    """One trace for all settings of the methods that need the same statistics of the same network."""
    key = (model.network, statistics)
    if key not in _observed:
        _observed[key] = trace(model, statistics)
    return _observed[key]


def trace(model: Model, statistics: tuple[str, ...]) -> Trace:
    """What these statistics see of the tiny corpora."""
    made = Trace(model.fingerprint, model.name, {name: statistic(name)(model, model.geometry) for name in statistics})
    profile(model, made, corpora(model))
    return made


def ragged(model: Model, *, seed: int = 0, position: str = "original", compensate: bool = True) -> Plan:
    """No method's plan: every head has its own window, some are full, some compensate."""
    draw = torch.Generator().manual_seed(seed)
    shape = (model.geometry.layers, model.geometry.kv_heads)
    full = (torch.rand(shape, generator=draw) < 0.3) & full_attention(model.geometry)
    sink = torch.randint(0, 5, shape, generator=draw)
    recent = torch.randint(1, 9, shape, generator=draw)
    keep = Keep(
        sink=torch.where(full, 0, sink).int(),
        recent=torch.where(full, EVERYTHING, recent).int(),
        compensate=(~full & (torch.rand(shape, generator=draw) < 0.5) & compensate).to(torch.uint8),
        position=position,  # type: ignore[arg-type]
    )
    return Plan("ragged", model.fingerprint, keep=keep)


# What the laws are parametrised over: lossy settings of every method, and one plan that no method makes.
TINY = [f"{name}-{index}" for name, row in ROWS.items() for index in range(len(row.tiny))] + ["ragged"]
LOSSLESS = [f"{name}-{index}" for name, row in ROWS.items() for index in range(len(row.lossless))]


# Laws that could depend on an architecture run on these two for every case, and on one of the others in turn: every
# law meets every architecture, and laws of different `turn` take different ones for a case. No method's plan is special
# to a tiny model, so that three suffice; "ragged" and no plan at all run on all five.
ALWAYS = ("llama", "gemma3")
OTHERS = tuple(name for name in models.ARCHITECTURES if name not in ALWAYS)


def places(cases: Iterable[str | None], turn: int = 0) -> pytest.MarkDecorator:
    """Parametrises a test over `case` and `model`."""
    found: list[tuple[str | None, str]] = []
    for index, case in enumerate(cases):
        whole = case is None or case == "ragged"
        found += [(case, name) for name in (*ALWAYS, *(OTHERS if whole else [OTHERS[(index + turn) % len(OTHERS)]]))]
    return pytest.mark.parametrize(("case", "model"), found, indirect=["model"])


def only(applies: bool, reason: str) -> None:
    """Not every law is every case's: its plan says so, which is made when a test runs, not when it is collected."""
    if not applies:
        pytest.skip(reason)


def on(case: str, model: Model) -> tuple[Model, Plan]:
    """A case of `TINY` and the model to run it on: in fp64 where a plan rounds or ranks numbers, since both jump."""
    made = tiny(case, model.name)
    select = made.keep is not None and made.keep.select is not None
    jumps = made.slots["store"] or made.slots["read"] or select
    return (models.double(model.name) if jumps else model), made


def selects(case: str) -> bool:
    """Is this case's cache thinned by a score at the end of the prompt, or an encoding fitted to it, so that it matters
    where the prompt ends?"""
    made = tiny(case, "llama")
    thinned = made.keep is not None and made.keep.select is not None
    return thinned or (made.store is not None and made.store.fits)


def across(plan: Plan) -> bool:
    """Are layers written as one? Then no chunk can see its own entries coded, nor a layer those of the next."""
    return plan.store is not None and bool(plan.store.spans)


def sparse(case: str) -> bool:
    """Do a prompt's queries not read all of it, unless prefill is decode?"""
    read = tiny(case, "llama").read
    return read is not None and read.sparse


def by_chunk(case: str) -> bool:
    """Does this case evict after every chunk of the prompt?"""
    keep = tiny(case, "llama").keep
    return keep is not None and keep.select is not None and keep.select.when == "chunk"


def known(case: str) -> bool:
    """Does the entry-by-entry definition know every rule that this case names, and nothing that depends on others?"""
    made = tiny(case, "llama")
    told = made.keep is None or made.keep.select is None or defined(made.keep.select)
    return told and (made.store is None or (len(made.store.chain) == 1 and not made.store.fits))


def looks_at_queries(case: str) -> bool:
    """Does a KV head decide by its own queries? Then copies of it, with fewer queries each, may decide otherwise."""
    return selects(case) or tiny(case, "llama").slots["read"]


def sees_channels(case: str) -> bool:
    """Does this case look at single channels of rotated keys, which change with the origin of positions?"""
    made = tiny(case, "llama")
    mixes = made.keep is not None and made.keep.select is not None and made.keep.select.merge == "convolution"
    stores = made.store is not None and any(encoding.rotated for store in made.store.chain for encoding in store.keys)
    return made.slots["read"] or mixes or stores


@functools.cache
def tiny(case: str, model_name: str) -> Plan:
    """The plan of one case of `TINY` for a shared model."""
    model = models.shared(model_name)
    if case == "ragged":
        return ragged(model)
    name, index = case.rsplit("-", 1)
    return plan(name, model, ROWS[name].tiny[int(index)])


@functools.cache
def lossless(case: str, model_name: str) -> Plan:
    """The plan of one case of `LOSSLESS` for a shared model."""
    name, index = case.rsplit("-", 1)
    return plan(name, models.shared(model_name), ROWS[name].lossless[int(index)])
