"""One row per method: small settings, lossless settings, and a ladder of growing budgets. The laws run over these rows.

A new method gets a row here and is then held to every law; `test_methods.py` fails while it has none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

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

Options = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """tiny: lossy within a few tokens; none for a method that changes no cache by itself. lossless: on sequences of
    up to 900 tokens. ladder: growing budgets for the
    induction model and repeats of 24 tokens, the last one lossless. loss: nats that the first one costs at least."""

    tiny: tuple[Options, ...]
    lossless: tuple[Options, ...]
    ladder: tuple[Options, ...]
    loss: float = 1.0


DUO: Options = dict(steps=3, lengths=(160,), passkeys=1)
ROWS = {
    "streaming": Row(
        tiny=(dict(sink=2, recent=5), dict(sink=0, recent=3), dict(sink=1, recent=6, position="original")),
        lossless=(dict(recent=900), dict(recent=900, position="original")),
        ladder=tuple(dict(sink=1, recent=recent, position="original") for recent in (2, 12, 30, 200)),
    ),
    "draft": Row(tiny=(), lossless=({}, dict(tokens=1)), ladder=()),
    "razor": Row(
        tiny=(dict(induction=0.3, echo=0.2, sink=2, recent=5, recent_ratio=0.0),),
        lossless=(dict(induction=1.0), dict(induction=0.0, recent=900)),
        ladder=tuple(
            dict(induction=share, echo=0.0, sink=1, recent=4, recent_ratio=0.0, compensate=False)
            for share in (0.0, 0.125, 0.5, 1.0)
        ),
    ),
    "kivi": Row(
        tiny=(dict(bits=2, group=8, recent=3, block=8), dict(bits=4, group=8, recent=0, block=16, sink=2)),
        lossless=(dict(group=8, recent=900, block=8),),
        ladder=tuple(dict(bits=bits, group=8, recent=0, block=8) for bits in (1, 2, 4, 8)),
        loss=1e-3,  # keys made of zeros and ones survive much
    ),
    "snapkv": Row(
        tiny=(dict(budget=0.4, window=3, kernel=3), dict(budget=9, window=2, kernel=1, pool="none", sink=1)),
        lossless=(dict(budget=1.0),),
        ladder=tuple(dict(budget=share, window=2, kernel=3) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "quest": Row(
        tiny=(dict(budget=0.3, page=4, dense=1, recent=3), dict(budget=5, page=1, dense=0, sink=2, recent=1)),
        lossless=(dict(budget=1.0, page=4), dict(recent=900)),
        ladder=tuple(dict(budget=share, page=4, dense=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "duo": Row(
        tiny=(DUO | dict(full=0.4, sink=2, recent=5),),
        lossless=(DUO | dict(full=1.0), DUO | dict(full=0.0, recent=900)),
        ladder=tuple(DUO | dict(full=share, sink=1, recent=4, lr=0.2, steps=6) for share in (0.0, 0.125, 0.5, 1.0)),
    ),
}


def plan(name: str, model: Model, settings: Options, *, seed: int = 0) -> Plan:
    """Calibrate one method as the command line does, on tiny corpora."""
    statistics = method(name).STATISTICS
    made = trace(model, statistics) if statistics else None
    return calibrate(name, settings, model=models.with_tokenizer(model), trace=made, seed=seed)


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


def on(case: str, model: Model) -> tuple[Model, Plan]:
    """A case of `TINY` and the model to run it on: in fp64 where a plan rounds or ranks numbers, since both jump."""
    made = tiny(case, model.name)
    select = made.keep is not None and made.keep.select is not None
    jumps = made.slots["store"] or made.slots["read"] or select
    return (models.double(model.name) if jumps else model), made


def selects(case: str) -> bool:
    """Is this case's cache thinned by a score at the end of the prompt, so that it matters where the prompt ends?"""
    keep = tiny(case, "llama").keep
    return keep is not None and keep.select is not None


def looks_at_queries(case: str) -> bool:
    """Does a KV head decide by its own queries? Then copies of it, with fewer queries each, may decide otherwise."""
    return selects(case) or tiny(case, "llama").slots["read"]


def sees_channels(case: str) -> bool:
    """Does this case look at single channels of rotated keys, which change with the origin of positions?"""
    made = tiny(case, "llama")
    return made.slots["read"] or (made.store is not None and any(encoding.rotated for encoding in made.store.keys))


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
