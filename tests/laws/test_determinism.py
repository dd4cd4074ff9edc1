"""Law 6, second half: the same inputs give the same file, bit for bit, and the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvtool import registry
from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from tests import models
from tests.laws.methods import ROWS, TINY, places, plan, tiny, trace
from tests.models import random_ids
from tests.running import by_default, feed
from tests.tolerance import same


@pytest.mark.parametrize("name", ROWS)
def test_the_same_plan_file_twice(name: str, tmp_path: Path) -> None:
    payloads = []
    for turn in ("first", "second"):
        model = models.build("llama")  # built again: nothing may hang on object identity
        made = plan(name, model, (ROWS[name].tiny or ROWS[name].lossless)[0], seed=3)
        payloads.append(Path(made.write(str(tmp_path / turn))).read_bytes())
    assert payloads[0] == payloads[1]


def test_the_same_trace_file_twice(tmp_path: Path) -> None:
    payloads = []
    for turn in ("first", "second"):
        made = trace(models.build("llama"), tuple(registry.names("statistics")))
        payloads.append(Path(made.write(str(tmp_path / turn))).read_bytes())
    assert payloads[0] == payloads[1]


@places(TINY)
def test_the_same_logits_twice(case: str, model: Model) -> None:
    """The second time with another default dtype, which is the caller's affair."""
    ids, made = random_ids(2, 25, seed=12), tiny(case, model.name)
    first, second = (
        by_default(dtype, lambda: feed(model, SegmentCache(model, made), ids, [20, *[1] * 5]))
        for dtype in (torch.float32, torch.bfloat16)
    )
    same(first, second)
