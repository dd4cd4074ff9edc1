"""TriForce's known answers: its chunks, its fixed size, and drafts that change nothing however small the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from kvtool import speculate as speculation
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan, compose
from kvtool.replay.subject import Subject
from kvtool.speculate import Outcome, Rule, speculate
from tests import models
from tests.methods.evicting import D, H, K, lane, prompted, random, select, step
from tests.models import random_ids
from tests.running import feed, rows_held
from tests.tolerance import same

CHUNK = 4


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of 22 entries: KV head 0's last query looks at chunks 2 and 4, head 1's at 3 and, less, 5."""
    q, k = torch.zeros(1, H, 22, D), 0.01 * random(1, K, 22, D)
    q[:, :2, -1, 0] = q[:, 2:, -1, 1] = 1.0
    k[:, 0, 8:12, 0], k[:, 0, 16:20, 0] = 3.0, 2.0
    k[:, 1, 12:16, 1], k[:, 1, 20:22, 1] = 3.0, 1.0  # the last chunk has two entries
    k[:, 0, 13, 0] = 6.0  # one large key: its chunk's mean stays below the others
    return q, k


def test_the_last_query_chooses_chunks_by_their_means() -> None:
    kept = prompted(lane(select("triforce", budget=3 * CHUNK, chunk=CHUNK)), *planted())
    same(kept[0, 0], torch.tensor([*range(4), *range(8, 12), *range(16, 20)]))
    assert set(range(4)) | set(range(12, 16)) | {20, 21} <= set(kept[0, 1].tolist())


@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_query_heads_choose_together(group: str) -> None:
    """One of two query heads likes chunk 2 much, both like chunk 4 somewhat: means prefer neither's own best."""
    q, k = torch.zeros(1, H, 20, D), torch.zeros(1, K, 20, D)
    q[:, 0, -1, 0] = q[:, 1, -1, 1] = q[:, :2, -1, 2] = 1.0
    k[:, 0, 8:12, 0], k[:, 0, 8:12, 1], k[:, 0, 16:20, 2] = 3.0, -2.0, 2.0
    kept = prompted(lane(select("triforce", budget=2 * CHUNK, chunk=CHUNK, group=group)), q, k)
    same(kept[0, 0, CHUNK:], torch.arange(8, 12) if group == "max" else torch.arange(16, 20))


def test_what_is_decoded_takes_the_place_of_the_worst_chunks() -> None:
    """Then, of the oldest decoded; the first chunk always stays."""
    made, (q, k) = lane(select("triforce", budget=3 * CHUNK, chunk=CHUNK)), planted()
    rows = prompted(made, q, k)[0, 0].tolist()
    held = k[:, :, rows]
    for number in range(12):
        held = torch.cat([held, 9 * random(1, K, 1, D)], dim=2)
        index = step(made, random(1, H, 1, D), held, 23 + number)
        rows = [[*rows, 22 + number][at] for at in index[0, 0].tolist()]
        held = held.gather(2, index[..., None].expand(-1, -1, -1, D))
        assert len(rows) == 3 * CHUNK
        worst, best = [r for r in rows if 16 <= r < 20], [r for r in rows if 8 <= r < 12]
        assert (len(worst), len(best)) == (max(0, 3 - number), min(4, max(0, 7 - number)))
        assert rows[:CHUNK] == [0, 1, 2, 3]
    assert rows[CHUNK:] == list(range(26, 34))


def test_the_copy_grows_or_not() -> None:
    model, ids = models.shared("llama"), random_ids(1, 40, seed=2)
    for tail, held in (("overwrite", 16), ("grow", 16 + 9)):
        plan = calibrate("triforce", dict(budget=16, chunk=CHUNK, tail=tail), model=model)
        assert [len(row) for row in rows_held(model, plan, ids, [31, *[1] * 9])] == [held] * 2


def drafted(model: Model, made: Plan | dict[str, Any], steps: int) -> Outcome:
    plan = made if isinstance(made, Plan) else calibrate("triforce", made, model=model)
    ids = random_ids(1, 30, seed=4)
    subject = Subject(model, plan)
    caches = subject.both(ids[:, :-1])
    return speculate(
        model, caches["full"], caches["plan"], ids[:, -1:], steps, plan.draft, below=subject.below(caches["full"])
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(budget=8, chunk=4, tokens=3), dict(budget=0.5, chunk=2, tokens=5, group="max"),
        dict(budget=9, chunk=4, tail="grow", tokens=1), dict(budget=16, chunk=4, tokens=6, window=5, sink=1),
        dict(budget=12, chunk=3, tokens=4, window=2, sink=0, ahead=5),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_tokens_are_the_full_caches(architecture: str, settings: dict[str, Any]) -> None:
    model = models.double(architecture)
    token, cache, expected = random_ids(1, 30, seed=4), SegmentCache(model), []
    feed(model, cache, token[:, :-1], [29])
    with model.served(), torch.no_grad():
        for _ in range(36):
            token = model.network(input_ids=token[:, -1:], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            expected.append(int(token))
    outcome = drafted(model, settings, 36)
    assert outcome.tokens[0].tolist() == expected
    assert outcome.passes == 36 - outcome.accepted
    assert len(outcome.drafting) == 1 + ("window" in settings)
    if "window" not in settings:
        assert outcome.drafting == (outcome.proposed,)
    else:  # the third tier saves passes over the copy
        assert outcome.drafting[0] < outcome.proposed


@pytest.mark.parametrize(
    "other", [("kivi", dict(group=8, recent=1, block=8)), ("quest", dict(page=4, dense=0, recent=1))]
)
def test_a_copy_that_grows_is_encoded_or_read(other: tuple[str, dict[str, Any]]) -> None:
    model = models.double("llama")
    plan = calibrate("triforce", dict(budget=12, chunk=4, tail="grow", tokens=3), model=model)
    both = compose(plan, calibrate(*other, model=model))
    alone, composed = drafted(model, plan, 30), drafted(model, both, 30)
    assert composed.tokens.tolist() == alone.tokens.tolist()
    assert composed.acceptance != alone.acceptance


@pytest.mark.parametrize("settings", [dict(budget=90), dict(budget=1.0, tail="grow")], ids=str)
def test_a_budget_of_everything_is_always_accepted(settings: dict[str, Any]) -> None:
    assert drafted(models.double("llama"), settings, 60).acceptance == 1.0


RUNS = 4000
P, Q, TARGET = ([0.3, 0.7], [0.6, 0.4], [0.5, 0.5])


def two_tiers(monkeypatch: pytest.MonkeyPatch, *, released: bool) -> int:
    """How often symbol 0 comes out of `RUNS` rounds on a vocabulary of two: a draft of law Q below a copy of law P,
    under a full cache of law TARGET. released: after a rejection the copy draws from P, as TriForce's code does."""
    generator = torch.Generator().manual_seed(0)
    rule, first = Rule(1.0, generator), 0
    law = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("p", P), ("q", Q), ("t", TARGET))}

    class Fixed:
        """A tier whose law is the same everywhere."""

        def __init__(self, name: str):
            self.logits = law[name].log()

        def forward(self, sequence: list[int]) -> torch.Tensor:
            return self.logits.expand(3, -1)

        def cut(self, count: int) -> None:
            pass

    right = speculation.verify

    def verify(logits: torch.Tensor, drafted: list[int], laws: list[torch.Tensor], rule: Rule) -> list[int]:
        out = right(logits, drafted, laws, rule)
        if released and drafted and len(out) == 1:
            out[0] = speculation.draw(rule.law(logits[0]), generator)
        return out

    monkeypatch.setattr(speculation, "verify", verify)
    for _ in range(RUNS):
        drafted, laws = speculation.propose([Fixed("p"), Fixed("q")], [0], 2, 1, rule)  # type: ignore[list-item]
        assert len(drafted) == 2
        first += right(law["t"].log().expand(3, -1), drafted[:1], laws[:1], rule)[0] == 0
    return first


def test_two_symbols_have_the_full_caches_law(monkeypatch: pytest.MonkeyPatch) -> None:
    first = two_tiers(monkeypatch, released=False)
    assert chisquare([first, RUNS - first], [0.5 * RUNS, 0.5 * RUNS]).pvalue > 1e-3


def test_the_released_inner_step_has_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its proposals are (.39, .61), not the (.3, .7) that it tells, and what comes out is (.564, .436)."""
    first = two_tiers(monkeypatch, released=True)
    assert chisquare([first, RUNS - first], [0.564 * RUNS, 0.436 * RUNS]).pvalue > 1e-3
    assert chisquare([first, RUNS - first], [0.5 * RUNS, 0.5 * RUNS]).pvalue < 1e-6


def test_refused() -> None:
    with pytest.raises(InputError, match="budget"):
        select("triforce", budget=5)
