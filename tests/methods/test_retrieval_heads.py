"""Known answers of the retrieval heads, card A1; the statistic's own are in tests/statistics/test_retrieval.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.trace import Trace
from tests import models
from tests.laws.methods import trace
from tests.models import INDUCTION
from tests.tolerance import close, same


def heads(model: Model, seen: Trace | None = None, **settings: object) -> Plan:
    settings = {"sink": 2, "recent": 5, "full": 1 / 8, **settings}
    return calibrate("retrieval-heads", settings, model=model, trace=seen or trace(model, ("retrieval",)))


def observed(model: Model, score: torch.Tensor, steps: torch.Tensor, *, counted: int = 2, prompts: int = 3) -> Trace:
    """A trace of sums [L,H] that no model made."""
    seen = Trace(model.fingerprint, model.name, trace(model, ("retrieval",)).statistics)
    statistic = seen["retrieval"]
    for name, values in (("score", score), ("steps", steps)):
        statistic[name].copy_(values)
    statistic["counted"].fill_(counted)
    statistic["prompts"].fill_(prompts)
    return seen


def chosen(plan: Plan) -> set[tuple[int, int]]:
    assert plan.keep is not None
    return {(layer, head) for layer, head in plan.keep.full.nonzero().tolist()}


def test_the_induction_head_scores_one_and_is_kept(induction: Model) -> None:
    """Prompts end with the token before the needle: the head that copies scores 1 per prompt, all others 0."""
    plan = heads(induction)
    expected = torch.zeros(induction.geometry.layers, induction.geometry.query_heads)
    expected[INDUCTION] = 1.0
    same(plan.evidence["score"], expected)
    assert plan.evidence["counted"].tolist() == [3, 3]
    assert chosen(plan) == {INDUCTION}
    assert plan.provenance["facts"] == {
        "full_heads": 1, "full_heads_without_score": 0, "query_heads_above_0.1": 1,
    }  # fmt: skip


def test_more_heads_than_copy_are_told(induction: Model) -> None:
    """Beyond the heads that ever copied, the choice is a seeded draw; the plan says of how many."""
    plan = heads(induction, full=0.5)
    assert INDUCTION in chosen(plan)
    assert plan.provenance["facts"]["full_heads_without_score"] == 3


def test_a_group_scores_by_its_best_head_or_by_its_mean(llama: Model) -> None:
    """One head of KV head 0 copies all; of KV head 1 all three copy half."""
    sums = torch.zeros(llama.geometry.layers, llama.geometry.query_heads)
    sums[1, 0], sums[1, 3:] = 2.0, 1.0
    seen = observed(llama, sums, sums)
    close(heads(llama, seen).evidence["score"], sums / 2)
    assert chosen(heads(llama, seen, full=1 / 6)) == {(1, 0)}
    assert chosen(heads(llama, seen, full=1 / 6, reduce="mean")) == {(1, 1)}


def test_the_released_sum_counts_a_token_at_each_step(llama: Model) -> None:
    score, steps = torch.zeros(2, llama.geometry.layers, llama.geometry.query_heads)
    score[0, 0], score[2, 5] = 2.0, 1.0
    steps[0, 0], steps[2, 5] = 2.0, 3.0
    seen = observed(llama, score, steps)
    assert chosen(heads(llama, seen, full=1 / 6)) == {(0, 0)}
    plan = heads(llama, seen, full=1 / 6, mode="code")
    assert chosen(plan) == {(2, 1)}
    assert float(plan.evidence["score"].max()) == 1.5


def test_prompts_that_were_not_answered_rank_no_heads(llama: Model) -> None:
    zero = torch.zeros(llama.geometry.layers, llama.geometry.query_heads)
    seen = observed(llama, zero, zero, counted=0)
    with pytest.raises(InputError, match="0 of 3 prompts"):
        heads(llama, seen)
    with pytest.raises(InputError, match="expected 3"):
        heads(llama, observed(llama, zero, zero), answered=3)
    assert heads(llama, seen, answered=0).provenance["facts"]["full_heads_without_score"] == 1


def test_heads_with_a_window_of_their_own_are_not_ranked() -> None:
    model = models.shared("gemma3")
    plan = heads(model, full=0.5, answered=0)
    assert plan.keep is not None
    full = plan.keep.full[[window is None for window in model.geometry.windows]]
    assert int(full.sum()) == round(0.5 * full.numel())
    assert bool(plan.keep.full[[window is not None for window in model.geometry.windows]].all())


@pytest.mark.parametrize("settings", [{"full": 1.5}, {"mode": "both"}, {"reduce": "sum"}, {"recent": 0}])
def test_bad_options(settings: dict[str, object], induction: Model) -> None:
    with pytest.raises(InputError):
        heads(induction, **settings)
