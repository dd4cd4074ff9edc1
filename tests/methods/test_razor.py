"""Known answers of RazorAttention, card A3. The one-hot heads of check b are in tests/statistics/test_induction.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.mean import Mean
from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.window import Window
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.methods._base import best, per_kv_head
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import EVERYTHING
from tests import models
from tests.laws.methods import trace
from tests.models import ECHO, INDUCTION, random_ids
from tests.running import feed, own
from tests.tolerance import close, error, same

STEP = Step(start=0, scale=0.25, softcap=None, strict=True)


def razor(model: Model, **settings: object) -> Plan:
    return calibrate("razor", {"recent_ratio": 0.0, **settings}, model=model, trace=trace(model, ("induction",)))


def chosen(plan: Plan) -> set[tuple[int, int]]:
    assert plan.keep is not None
    return {(layer, head) for layer, head in plan.keep.full.nonzero().tolist()}


def test_identical_dropped_keys_lose_nothing() -> None:
    """Check a: k̂ is then exact and log N its weight; without compensation the output is far off."""
    torch.manual_seed(0)
    sink, recent, tokens, width = 2, 6, 40, 16
    q, k, v = torch.randn(1, 8, tokens, width), torch.randn(1, 4, tokens, width), torch.randn(1, 4, tokens, width)
    k[:, :, sink : tokens - recent] = k[:, :, sink : sink + 1]
    everything = Window([0, 1, 2, 3], sink=0, recent=tokens).step(q, k, v, STEP)[0][:, :, -1]
    for compensate in (True, False):
        lane = Window([0, 1, 2, 3], sink=sink, recent=recent, compensate=compensate)
        out = lane.step(q, k, v, STEP)[0][:, :, -1]
        assert (error(out, everything) < 1e-6) == compensate
        if not compensate:
            assert error(out, everything) > 0.3


def test_identical_dropped_keys_lose_nothing_in_decode() -> None:
    torch.manual_seed(0)
    sink, recent, tokens, width = 1, 4, 30, 16
    q, k, v = torch.randn(1, 4, tokens, width), torch.randn(1, 4, tokens, width), torch.randn(1, 4, tokens, width)
    k[:, :, sink:] = k[:, :, sink : sink + 1]
    everything = Window([0, 1, 2, 3], sink=0, recent=tokens).step(q, k, v, STEP)[0]
    lane = Window([0, 1, 2, 3], sink=sink, recent=recent, compensate=True)
    for at in range(tokens):
        now = slice(at, at + 1)
        out, _ = lane.step(q[:, :, now], k[:, :, now], v[:, :, now], Step(at, 0.25, strict=True))
        assert error(out, everything[:, :, now]) < 1e-6


def test_the_mean_is_the_mean() -> None:
    torch.manual_seed(0)
    mean, k, v, q = Mean(), torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8), torch.randn(2, 6, 1, 8)
    for low, high in ((0, 4), (4, 10)):
        mean.fold(k[:, :, low:high], v[:, :, low:high])
        out, lse = mean.attend(q, 0.5, None)
        for row in range(2):
            for head in range(6):
                key, value = k[row, head // 2, :high].mean(0), v[row, head // 2, :high].mean(0)
                close(out[row, head, 0], value)
                close(lse[row, head, 0], 0.5 * q[row, head, 0] @ key + torch.tensor(float(high)).log())


def test_nothing_dropped_no_slot(llama: Model) -> None:
    """Check c: as long as all fits, compensation adds no entry and changes nothing."""
    ids = random_ids(1, 9, seed=32)
    outs = []
    for compensate in (True, False):
        plan = razor(llama, induction=0, echo=0, sink=2, recent=7, compensate=compensate)
        cache = SegmentCache(llama, plan, protocol="strict")
        outs.append(feed(llama, cache, ids, [6, 1, 1, 1]))
        assert cache.entries().unique().tolist() == [9]
    same(*outs)
    close(outs[0], own(llama, ids))
    mean = Mean()
    out, lse = mean.attend(torch.randn(1, 4, 1, 8), 1.0, None)
    assert bool((lse == float("-inf")).all())
    assert not bool(out.any())


def test_one_more_is_one_slot(llama: Model) -> None:
    cache = SegmentCache(llama, razor(llama, induction=0, echo=0, sink=2, recent=7))
    feed(llama, cache, random_ids(1, 10, seed=32), [9, 1])
    assert cache.entries().unique().tolist() == [2 + 7 + 1]


def test_it_finds_the_induction_head(induction: Model) -> None:
    plan = razor(induction, induction=1 / 8, echo=0)
    assert chosen(plan) == {INDUCTION}
    assert chosen(razor(induction, induction=1 / 8, echo=1 / 8)) == {INDUCTION, ECHO}
    assert plan.keep is not None
    assert plan.keep.compensate.tolist() == [[1, 1, 1, 1], [1, 0, 1, 1]]
    assert float(plan.evidence["induction"][INDUCTION]) > 0.9


@pytest.mark.parametrize(("induction_share", "echo_share"), [(0.14, 0.01), (0.5, 0.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_quota_holds_whatever_the_ties(induction_share: float, echo_share: float, induction: Model) -> None:
    plan = razor(induction, induction=induction_share, echo=echo_share)
    assert len(chosen(plan)) <= round(8 * induction_share) + round(8 * echo_share)
    assert len(chosen(plan)) >= round(8 * induction_share)


def test_heads_with_a_window_of_their_own_are_not_ranked() -> None:
    model = models.shared("gemma3")
    plan = razor(model, induction=0.5, echo=0, recent=4)
    assert plan.keep is not None
    full = plan.keep.full[[window is None for window in model.geometry.windows]]
    assert int(full.sum()) == round(0.5 * full.numel())


def test_the_window_may_be_a_share_of_the_prompt(llama: Model) -> None:
    plan = razor(llama, induction=0, echo=0, sink=1, recent=4, recent_ratio=0.25)
    with pytest.raises(InputError, match="prompt_length"):
        SegmentCache(llama, plan)
    for prompt, window in ((8, 4), (40, 10)):
        cache = SegmentCache(llama, plan, prompt_length=prompt)
        feed(llama, cache, random_ids(1, prompt + 1), [prompt, 1])
        assert cache.entries().unique().tolist() == [1 + window + (prompt + 1 > 1 + window)]


def test_the_group_takes_its_best_head() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.0, 0.4]])
    close(per_kv_head(scores, 2), torch.tensor([[0.9, 0.4]]))
    close(per_kv_head(scores, 2, "mean"), torch.tensor([[1.3 / 3, 0.2]]))


def test_best_breaks_ties_by_seed_and_keeps_to_the_eligible() -> None:
    scores, eligible = torch.tensor([[1.0, 1.0, 0.5], [1.0, 2.0, 1.0]]), torch.ones(2, 3, dtype=torch.bool)
    eligible[1, 1] = False
    picks = {tuple(best(scores, 2, eligible, seed).flatten().tolist()) for seed in range(20)}
    assert len(picks) > 1
    for pick in picks:
        assert sum(pick) == 2
        assert not pick[4]
        assert not pick[2]
    assert torch.equal(best(scores, 2, eligible, 3), best(scores, 2, eligible, 3))
    assert int(best(scores, 99, eligible).sum()) == 5
    assert int(best(scores, -1, eligible).sum()) == 0


def test_a_trace_without_the_statistic_says_which(llama: Model) -> None:
    with pytest.raises(InputError, match="induction"):
        calibrate("razor", {}, model=llama, trace=trace(llama, ("gram",)))
    with pytest.raises(InputError, match="reads a trace"):
        calibrate("razor", {}, model=llama)
    with pytest.raises(InputError, match="share"):
        razor(llama, induction=1.5)


def test_everything_is_marked_as_everything(induction: Model) -> None:
    plan = razor(induction, induction=1.0)
    assert plan.keep is not None
    assert plan.keep.lossless
    assert plan.keep.recent.unique().tolist() == [EVERYTHING]
