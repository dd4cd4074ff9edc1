"""Known answers of StreamingLLM, card A6."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.window import Window
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from tests import models
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, error, same

SINK, RECENT = 3, 8


def cache(model: Model, **settings: object) -> SegmentCache:
    plan = calibrate("streaming", {"sink": SINK, "recent": RECENT, **settings}, model=model)
    return SegmentCache(model, plan, protocol="strict")


@pytest.mark.parametrize("position", ["reindex", "original"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox", "mistral", "cohere"])
def test_what_fits_is_attended_to_bit_for_bit(name: str, position: str) -> None:
    """Check a: t ≤ S + R."""
    model = models.shared(name)
    ids = random_ids(1, SINK + RECENT, seed=30)
    chunks = [6, *[1] * (SINK + RECENT - 6)]
    same(feed(model, cache(model, position=position), ids, chunks), feed(model, SegmentCache(model), ids, chunks))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox", "mqa", "rope-yarn", "rope-llama3", "cohere"])
def test_one_layer_equals_a_fresh_run_on_what_is_kept(name: str) -> None:
    """Check b: with positions counted inside the cache, [first S | last R] is to one layer a text of its own."""
    model = models.shallow(name)
    ids = random_ids(2, 30, seed=31)
    logits = feed(model, cache(model), ids, [20, *[1] * 10])
    for last in (SINK + RECENT, 21, 25, 30):
        kept = torch.cat([ids[:, :SINK], ids[:, last - RECENT : last]], dim=1)
        close(logits[:, last - 1], own(model, kept)[:, -1])


def test_true_positions_are_another_method() -> None:
    model = models.shallow("llama")
    ids = random_ids(1, 30, seed=31)
    kept = torch.cat([ids[:, :SINK], ids[:, -RECENT:]], dim=1)
    logits = feed(model, cache(model, position="original"), ids, [30])
    assert error(logits[:, -1], own(model, kept)[:, -1]) > 1e-2


def test_two_layers_do_not_equal_a_fresh_run(llama: Model) -> None:
    """Deep states have seen what was evicted."""
    ids = random_ids(1, 30, seed=31)
    kept = torch.cat([ids[:, :SINK], ids[:, -RECENT:]], dim=1)
    assert error(feed(llama, cache(llama), ids, [30])[:, -1], own(llama, kept)[:, -1]) > 1e-2


def test_without_sinks_a_head_that_parks_its_attention_there_breaks() -> None:
    """Check c, on heads with a high logit and no value at token 0."""
    torch.manual_seed(0)
    heads, tokens, width = 64, 60, 16
    q, k, v = (torch.randn(1, heads, tokens, width) for _ in range(3))
    q[..., 0], k[..., 0] = width**0.5, 0.0
    k[:, :, 0, 0], v[:, :, 0] = 9.0, 0.0
    step = Step(start=0, scale=width**-0.5, softcap=None, strict=True)

    def last(sink: int, recent: int) -> torch.Tensor:
        return Window(list(range(heads)), sink=sink, recent=recent).step(q, k, v, step)[0][:, :, -1]

    whole = last(0, tokens)
    assert float((last(0, 12) - whole).norm()) > 20 * float((last(1, 11) - whole).norm())


def test_the_plan_is_data_independent(model: Model) -> None:
    plan = calibrate("streaming", {"sink": "2", "recent": "5", "position": "original"}, model=model)
    assert plan.keep is not None
    assert plan.keep.position == "original"
    assert plan.keep.sink.unique().tolist() == [2]
    assert plan.keep.recent.unique().tolist() == [5]
    assert not bool(plan.keep.compensate.any())


@pytest.mark.parametrize(
    "settings", [{"recent": 0}, {"sink": -1}, {"position": "elsewhere"}, {"sinks": 2}, {"recent": "many"}]
)
def test_bad_options(settings: dict[str, object], llama: Model) -> None:
    with pytest.raises(InputError):
        calibrate("streaming", settings, model=llama)
