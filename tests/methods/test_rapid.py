"""RAPID's known answers: lossless at η = 0 whatever is retrieved, towards the draft above it, and what is retrieved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from kvtool import speculate as speculation
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.plan import read as read_plan
from kvtool.replay.subject import Subject
from kvtool.retrieval import excerpt, spans
from kvtool.slots import Excerpt
from kvtool.speculate import Outcome, Rule, speculate
from tests import models
from tests.laws.test_draft import VOCABULARY, few
from tests.methods.evicting import random
from tests.models import random_ids
from tests.tolerance import same

STEPS = 36


def drafted(model: Model, plan: Plan, steps: int = STEPS, **options: Any) -> Outcome:
    ids = random_ids(1, 40, seed=4)
    caches = Subject(model, plan).both(ids[:, :-1])
    return speculate(model, caches["full"], caches["plan"], ids[:, -1:], steps, plan.draft, **options)


def rapid(model: Model, **settings: Any) -> Plan:
    return calibrate("rapid", dict(chunk=4, question=5, tokens=3) | settings, model=model)


def written(model: Model) -> list[int]:
    """What the full cache writes."""
    return drafted(model, calibrate("draft", {}, model=model)).tokens[0].tolist()


@pytest.mark.parametrize("settings", [{}, dict(budget=4), dict(spans="3-9,20-22", start=2), dict(tokens=1)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_tokens_are_the_full_caches(architecture: str, settings: dict[str, Any]) -> None:
    model = models.double(architecture)
    outcome = drafted(model, rapid(model, **settings))
    assert outcome.tokens[0].tolist() == written(model)
    assert 0 <= outcome.acceptance < 1


@pytest.mark.parametrize("settings", [dict(question=100), dict(spans="0-39"), dict(budget=1.0)], ids=str)
def test_the_whole_prompt_is_always_accepted(settings: dict[str, Any]) -> None:
    model = models.double("llama")
    assert drafted(model, rapid(model, **settings)).acceptance == 1.0


def test_greedy_tokens_move_towards_the_draft() -> None:
    model = models.double("llama")
    plain, moved = (drafted(model, rapid(model, eta=eta)) for eta in (0.0, 8.0))
    assert moved.acceptance > plain.acceptance
    assert moved.tokens.tolist() != plain.tokens.tolist()


def laws() -> tuple[torch.Tensor, torch.Tensor]:
    q, p = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.2, 0.3, 0.1, 0.4])
    return p.double(), q.double()


def after(p: torch.Tensor, q: torch.Tensor, eta: float, alpha: float) -> tuple[float, list[float]]:
    """The share that is accepted, and the law of a round's first token, written out symbol by symbol."""
    gap = [float(a - b) if b >= alpha * max(q) else 0.0 for a, b in zip(p, q, strict=True)]
    raised = [float(a) * 2.718281828459045 ** (-eta * g) for a, g in zip(p, gap, strict=True)]
    aim = [one / sum(raised) for one in raised]
    taken = [min(float(b), a) for a, b in zip(aim, q, strict=True)]
    rest = [max(float(a - b), float(a) - c, 0.0) for a, b, c in zip(p, q, aim, strict=True)]
    return sum(taken), [t + (1 - sum(taken)) * r / sum(rest) for t, r in zip(taken, rest, strict=True)]


@pytest.mark.parametrize(("eta", "alpha"), [(0.0, 0.1), (5.0, 0.1), (5.0, 0.4), (2.0, 0.0)])
def test_a_round_has_the_law_of_its_formula(eta: float, alpha: float) -> None:
    p, q = laws()
    rule, runs = Rule(1.0, torch.Generator().manual_seed(1), eta, alpha), 4000
    share, law = after(p, q, eta, alpha)
    seen, accepted = [0] * 4, 0
    for _ in range(runs):
        token = speculation.draw(q, rule.generator)
        out = speculation.verify(torch.stack([p.log()] * 2), [token], [q], rule)
        seen[out[0]] += 1
        accepted += len(out) == 2
    assert chisquare(seen, [runs * one for one in law]).pvalue > 1e-3
    assert chisquare([accepted, runs - accepted], [runs * share, runs * (1 - share)]).pvalue > 1e-3
    if eta == 0:
        assert law == pytest.approx(p.tolist())
    else:
        plain, _ = after(p, q, 0.0, alpha)
        assert share > plain
        assert float((torch.tensor(law) - p).abs().sum()) > 1e-2


def test_sampled_tokens_have_the_full_caches_law() -> None:
    """The draft knows the end of the prompt only."""
    model, ids, runs = few(), torch.tensor([[1, 4, 2, 5, 3, 0]]), 250
    plan = calibrate("rapid", dict(question=2, least=99, tokens=1), model=model)
    subject, rule = Subject(model, plan), Rule(1.0)
    expected = rule.law(subject.step(subject.both(ids[:, :-1])["full"], ids[:, -1:])[0])
    own = rule.law(subject.step(subject.both(ids[:, :-1])["plan"], ids[:, -1:])[0])
    assert float((expected - own).abs().sum()) > 0.1
    generator, seen = torch.Generator().manual_seed(2), [0] * VOCABULARY
    for _ in range(runs):
        caches = subject.both(ids[:, :-1])
        out = speculate(
            model, caches["full"], caches["plan"], ids[:, -1:], 2, plan.draft, temperature=1.0, generator=generator
        )
        seen[int(out.tokens[0, 0])] += 1
    assert chisquare(seen, (runs * expected).tolist()).pvalue > 1e-3


@pytest.mark.parametrize("score", ["embedding", "words"])
def test_the_chunk_that_the_question_asks_for(score: str) -> None:
    model = models.build("llama")
    model.network.get_input_embeddings().weight.data = random(128, 48)  # tokens unlike one another
    tokens = torch.arange(64) % 50
    tokens[-4:] = tokens[24:28] = torch.tensor([90, 91, 92, 93])
    spec = Excerpt(score=score, chunk=8, budget=8, question=4)  # type: ignore[arg-type]
    assert spans(model, tokens, spec) == [(24, 32)]
    same(excerpt(model, tokens, spec), torch.cat([tokens[24:32], tokens[60:]]))
    two = Excerpt(score=score, chunk=8, budget=0.25, start=2, question=4)  # type: ignore[arg-type]
    found = spans(model, tokens, two)
    assert len(found) == 2
    assert found == sorted(found)
    assert any(low <= 24 < high for low, high in found)
    assert spans(model, tokens, Excerpt(score=score, chunk=8, least=99.0)) == []  # type: ignore[arg-type]


def test_given_spans_are_taken_as_they_are() -> None:
    tokens = torch.arange(30)
    spec = Excerpt(torch.tensor([[4, 6], [9, 12]]), start=1, question=2)
    assert excerpt(models.shared("llama"), tokens, spec).tolist() == [0, 4, 5, 9, 10, 11, 28, 29]
    with pytest.raises(InputError, match="beyond the prompt"):
        excerpt(models.shared("llama"), tokens[:8], spec)


def test_a_start_token_of_the_models_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt without it would be unlike any that the model was trained on."""
    model, tokens = models.shared("llama"), torch.arange(30)
    monkeypatch.setattr(Model, "start", property(lambda self: [0]))
    spec = Excerpt(chunk=8, least=2.0, question=2)
    assert excerpt(model, tokens, spec).tolist() == [0, 28, 29]
    assert excerpt(model, tokens + 1, spec).tolist() == [29, 30]
    assert spans(model, tokens, Excerpt(chunk=27, budget=27, question=2)) == [(1, 28)]


def test_the_plan_is_a_file(tmp_path: Any) -> None:
    made = rapid(models.shared("llama"), spans="0-4,8-12", eta=10.0)
    found = read_plan(made.write(str(tmp_path / "rapid"))).draft
    assert found is not None
    assert found.excerpt is not None
    assert found.excerpt.spans is not None
    assert (found.eta, found.excerpt.spans.tolist()) == (10.0, [[0, 4], [8, 12]])


@pytest.mark.parametrize(
    ("option", "value"),
    [*(("spans", text) for text in ("4", "9-4", "a-b", "1-2-3", "1-2-3,4-5-6", "-4")), ("alpha", 1.5), ("budget", 0.0)],
)
def test_refused(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=option):
        rapid(models.shared("llama"), **{option: value})
