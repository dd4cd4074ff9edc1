"""Known answers of CAKE, card A15. Those of its rule for layers are in tests/cache/keep/test_layer_budgets.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.scores._base import View
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Select
from tests import models
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close


def cake(model: Model, **settings: object) -> Plan:
    return calibrate("cake", {"window": 4, "kernel": 3, **settings}, model=models.with_tokenizer(model))


def select(plan: Plan) -> Select:
    assert plan.keep is not None
    assert plan.keep.select is not None
    return plan.keep.select


@pytest.mark.parametrize("budget", [0.2, 0.4, 17])
def test_all_layers_together_hold_the_budget_at_every_step(budget: float) -> None:
    model, prompt = models.double("llama"), 50
    cache, ids = SegmentCache(model, cake(model, budget=budget)), random_ids(1, 58, seed=1)
    feed(model, cache, ids, [prompt, *[1] * 8])
    held, mean = cache.entries(), round(budget * prompt) if budget < 1 else int(budget)
    assert int(held.sum()) == mean * held.numel()
    assert len(held[:, 0].unique()) > 1


def test_an_entry_whose_attention_shifts_beats_a_steady_one() -> None:
    """Four queries pay one entry 0.2 each, one alone pays another 0.72, which is less in the mean."""
    model = models.shared("llama")
    shifting = select(cake(model, budget=0.5, kernel=1))
    paid = torch.tensor([[0.2, 0.0], [0.2, 0.0], [0.2, 0.0], [0.2, 0.72]]).double()
    logits = torch.cat([paid, 1 - paid.sum(1, keepdim=True)], dim=1).clamp_min(1e-9).log()
    k = torch.eye(3, 8)[None, None].double()
    q = torch.nn.functional.pad(logits, (0, 5))[None, None]
    for gamma, best in ((0.0, 0), (200.0, 1)):
        spec = Select(shifting.budget, observed=4, variance=gamma)
        score = spec.rule("score").score(View(q, torch.full((4,), 2), k, k, 1.0, None, spec, 0, [0]))[0, 0]
        assert int(score[:2].argmax()) == best
    close(score[1], paid[:, 1].mean() + 200 * paid[:, 1].var(), torch.float32)
    assert shifting.variance == 200.0


def test_calibrated_shares_are_what_prompts_were_dealt_in_the_mean() -> None:
    model = models.double("llama")
    plan = cake(model, budget=0.3, mode="calibrated", samples=3, tokens=240)
    shares = select(plan).budget
    assert select(plan).spread == "head"
    assert bool((shares == shares[:, :1]).all())
    assert float(shares.mean()) == pytest.approx(round(0.3 * 240) / 240)
    assert len(shares[:, 0].unique()) > 1
    assert torch.equal(plan.evidence["share"], shares)
    cache = SegmentCache(model, plan)
    feed(model, cache, random_ids(1, 60), [60])
    cache.finish()
    assert cache.entries()[:, 0].tolist() == [round(60 * share) for share in shares[:, 0].tolist()]


@pytest.mark.parametrize("settings", [{"tau1": 0.0}, {"kernel": 4}, {"gamma": -1}, {"budget": 0.0}, {"mode": "frozen"}])
def test_bad_options(settings: dict[str, object], llama: Model) -> None:
    with pytest.raises(InputError):
        cake(llama, **settings)
