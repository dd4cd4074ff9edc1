"""The demo model: all heads full is the model itself, in every task and under `generate`."""

from __future__ import annotations

import pytest
from transformers import DynamicCache

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import DEMO, Model, load
from kvtool.replay.subject import Subject
from kvtool.replay.verdict import replay, task
from tests.replay.conftest import windowed
from tests.tolerance import same

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def demo() -> Model:
    return load(DEMO)


def test_all_heads_full(demo: Model) -> None:
    options = {
        "passkey": {"lengths": (300,), "depths": (0.5,), "keys": 2},
        "text": {"prompt": 100, "tokens": 4, "samples": 1},
        "generation": {"prompt": 100, "tokens": 8},
        "speed": {"length": 128, "steps": 1},
    }
    tasks = {name: task(name).Options(**chosen) for name, chosen in options.items()}
    m = replay(Subject(demo, windowed(demo, full=True)), tasks).metrics
    assert m["recall"] == m["recall_full"] == 1
    assert m["kl"] == pytest.approx(0, abs=1e-6)
    assert (m["agreement"], m["same_tokens"], m["bytes_ratio"]) == (1, 8, 1)
    assert m["perplexity_full"] < 100


def test_generate(demo: Model) -> None:
    sides = demo.tokenizer(
        ["The capital of France is", "One, two, three,"], padding=True, padding_side="left", return_tensors="pt"
    )
    for beams in (1, 2):
        options = {**sides, "max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        expected = demo.network.generate(**options, past_key_values=DynamicCache(config=demo.network.config))
        with demo.served():
            cache = SegmentCache(demo, windowed(demo, full=True))
            same(demo.network.generate(**options, past_key_values=cache), expected)
    assert "Paris" in demo.tokenizer.decode(expected[0])
