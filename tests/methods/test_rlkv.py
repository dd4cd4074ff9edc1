"""Known answers of RLKV, card A5; rollouts and the GRPO terms are in tests/measuring/test_rollouts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods.rlkv import penalty
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.methods.training import interrupted
from tests.models import INDUCTION, random_ids, with_tokenizer
from tests.tolerance import close, same

SMALL = dict(
    tasks=("repeat",), lengths=(45,), problems=4, batch=2, samples=6, sink=2, recent=6, steps=12, lr=0.15, l1=0.3,
    threshold=0.2, temperature=1.0, full=1 / 8,
)  # fmt: skip


def rlkv(model: Model, **settings: object) -> Plan:
    return calibrate("rlkv", {**SMALL, **settings}, model=with_tokenizer(model))


def test_the_penalty() -> None:
    assert penalty(0.4, 0.5, 1e-3) == 0
    assert penalty(0.5, 0.5, 1e-3) == 0
    assert penalty(1.0, 0.5, 1e-3) == pytest.approx(1e-3 * 1.71828, rel=1e-5)


def test_the_induction_head_keeps_its_gate(induction: Model) -> None:
    """The planted case: only one head earns the reward; all others pay."""
    plan = rlkv(induction)
    alpha = plan.evidence["alpha"].clone()
    kept = float(alpha[INDUCTION])
    alpha[INDUCTION] = 0.0
    assert float(alpha.max()) < 0.1
    assert kept > 0.3
    assert float(plan.evidence["reward"][-1]) > 0.5
    assert plan.keep is not None
    assert plan.keep.full.nonzero().tolist() == [list(INDUCTION)]
    assert plan.keep.sink.max() == 2


def test_rewards_not_the_penalty_hold_the_gate(induction: Model) -> None:
    """With rewards that are all equal there is nothing to learn from: every gate falls alike, or none does."""
    steady = rlkv(induction, temperature=1e-6, steps=3)
    assert steady.evidence["reward"].tolist() == [1.0, 1.0, 1.0]
    assert steady.evidence["alpha"].unique().numel() == 1
    close(steady.evidence["alpha"], torch.full((2, 4), 1 - 3 * 0.15))
    useless = rlkv(induction, threshold=1.0, temperature=1e-6, steps=3)
    same(useless.evidence["alpha"], torch.ones(2, 4))


def test_a_second_update_on_the_same_answers_is_another_step(induction: Model) -> None:
    once, twice = (rlkv(induction, steps=2, updates=updates, temperature=1e-6) for updates in (1, 2))
    close(once.evidence["alpha"], torch.full((2, 4), 1 - 2 * 0.15))
    close(twice.evidence["alpha"], torch.full((2, 4), 1 - 4 * 0.15))
    learnt = rlkv(induction, steps=4, updates=2)
    assert float(learnt.evidence["alpha"][INDUCTION]) == float(learnt.evidence["alpha"].max())
    assert learnt.provenance["facts"]["steps"] == 4


def test_an_interrupted_training_resumes_where_it_was(tmp_path: Path, induction: Model) -> None:
    settings = {**SMALL, "steps": 4, "updates": 2, "patience": 0}
    seen = interrupted("rlkv", settings, with_tokenizer(induction), tmp_path, 3)
    assert [done for done in sorted(set(seen)) if done > min(seen)] in ([3, 4], [4])


def test_it_stops_when_the_choice_has_settled(induction: Model) -> None:
    assert rlkv(induction, steps=10, patience=3, full=1.0, samples=2).provenance["facts"]["steps"] == 6


def test_heads_with_a_window_of_their_own_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model answers rightly, each step lowers every gate but theirs."""
    model, prompt = models.shared("gemma3"), random_ids(1, 20)[0]
    with torch.no_grad():
        answer = model.network(input_ids=prompt[None]).logits[0, -1:].argmax(-1)
    monkeypatch.setattr("kvtool.methods.rlkv.problems", lambda *_, **__: [Sample(prompt, "text", answer=answer)])
    plan = rlkv(model, steps=2, full=0.5, temperature=1e-6, recent=40)
    assert plan.keep is not None
    for layer, window in enumerate(model.geometry.windows):
        gates = plan.evidence["alpha"][layer]
        close(gates, torch.full_like(gates, 1 - 2 * 0.15 * (window is None)))
        assert bool(plan.keep.full[layer].all()) or window is None


def test_gates_go_through_duo_and_back(tmp_path: Path, induction: Model) -> None:
    plan = rlkv(induction, steps=3)
    path = plan.write(str(tmp_path / "rlkv"))
    model = with_tokenizer(induction)
    duo = calibrate("duo", {"gates": path, "full": 1 / 4, "sink": 2, "recent": 6}, model=model)
    again = rlkv(induction, gates=path, full=1 / 4)
    for other in (duo, again):
        same(other.evidence["alpha"], plan.evidence["alpha"])
        assert other.keep is not None
        for name in ("sink", "recent"):
            same(getattr(other.keep, name), getattr(duo.keep, name))
    same(again.evidence["reward"], plan.evidence["reward"])


def test_released_gates(tmp_path: Path, induction: Model) -> None:
    table = tmp_path / "adapter_weights.tsv"
    table.write_text("\n".join("\t".join(map(str, row)) for row in [[0, 0.2, 0.1, 0], [0.9, 0, 0, 1.2]]))
    plan = rlkv(induction, gates=str(table), full=1 / 4)
    assert plan.keep is not None
    assert plan.keep.full.nonzero().tolist() == [[1, 0], [1, 3]]
    table.write_text("1\t2")
    with pytest.raises(InputError, match="another model"):
        rlkv(induction, gates=str(table))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tasks": "sums"}, "unknown task"), ({"batch": 0}, "bad option batch"), ({"full": 2.0}, "share"),
        ({"gates": "nowhere.plan"}, "nowhere"),
    ],
)  # fmt: skip
def test_bad_options(settings: dict[str, object], complaint: str, induction: Model) -> None:
    with pytest.raises(InputError, match=complaint):
        rlkv(induction, **settings)


def test_a_model_that_solves_nothing_is_told(llama: Model) -> None:
    with pytest.raises(InputError, match="solves none"):
        rlkv(llama)
