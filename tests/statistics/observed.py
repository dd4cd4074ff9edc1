"""What the profiler saw of one sample, beside the written-down pass over the same tokens; each model once."""

from __future__ import annotations

import functools

from kvtool import registry
from kvtool.corpus.base import Corpus, Sample, gather
from kvtool.model import Model
from kvtool.profile import profile
from kvtool.trace import Trace, statistic
from tests import models
from tests.corpora import KINDS
from tests.models import random_ids
from tests.statistics.naive import Seen, written_down

STATISTICS = registry.names("statistics")
TOKENS = 70  # more than a block of rows, and than a block of the reservoir


def trace(model: Model, corpora: dict[str, Corpus], names: list[str] | None = None) -> Trace:
    """A fresh trace of `names` (all statistics unless told)."""
    made = Trace(
        model.fingerprint, model.name, {name: statistic(name)(model, model.geometry) for name in names or STATISTICS}
    )
    profile(model, made, corpora)
    return made


@functools.cache
def text(name: str) -> tuple[Trace, list[Seen]]:
    """A shared model by its name → (trace of one text, the same text written down)."""
    model, ids = models.shared(name), random_ids(1, TOKENS, seed=20)[0]
    names = [other for other in STATISTICS if statistic(other).corpus == "text"]
    return trace(model, {"text": gather("text", [Sample(ids, "text")], seed=0, options={})}, names), written_down(
        model, ids
    )


def kinds_known() -> bool:
    """Is there a tiny corpus of every kind that some statistic observes?"""
    return {statistic(name).corpus for name in STATISTICS} <= set(KINDS)
