"""What the tasks measure: a lossless plan is the full cache in every metric, a lossy one is not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtool import registry
from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.text import text
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.replay.subject import Subject, batches, half
from kvtool.replay.verdict import task
from kvtool.slots import Draft, Keep, Select
from tests.replay.conftest import LOSSLESS, windowed
from tests.running import own

SMALL: dict[str, dict[str, Any]] = {
    "passkey": {"lengths": (200, 260), "depths": (0.2, 0.8), "keys": 2, "batch": 3},
    "needle": {"lengths": (260,), "depths": (0.3, 0.8), "samples": 1},
    "two-hop": {"lengths": (400,), "samples": 2},
    "graph": {"lengths": (900,), "samples": 2},
    "order": {"lengths": (400,), "samples": 2},
    "text": {"prompt": 48, "tokens": 6, "samples": 2},
    "generation": {"prompt": 48, "tokens": 6},
    "speed": {"length": 100, "steps": 3, "repeats": 2},
    "acceptance": {"prompt": 48, "tokens": 12, "samples": 2},
}
FED: dict[str, dict[str, Any]] = {"at once": {}, "strict": {"protocol": "strict"}, "chunks": {"chunk": 17}}


def run(name: str, subject: Subject) -> Any:
    """The task's result; the progress it announced is the progress it made."""
    module, steps = task(name), []
    options = module.Options(**SMALL[name])
    result = module.run(subject, options, steps.append)
    assert len(steps) == module.units(options)
    drafted = set() if subject.plan.draft is not None else set(getattr(module, "DRAFTED", ()))
    assert set(result.metrics) == set(module.METRICS) - drafted
    return result


def test_every_task_is_here() -> None:
    assert sorted(SMALL) == registry.names("replay/tasks")


@pytest.mark.parametrize("fed", FED)
@pytest.mark.parametrize("plan", [*LOSSLESS, "none"])
def test_lossless(plan: str, fed: str, model: Model) -> None:
    made = Plan("by hand", model.fingerprint) if plan == "none" else windowed(model, **LOSSLESS[plan])
    subject = Subject(model, made, **FED[fed])
    m = {name: run(name, subject).metrics for name in ("passkey", "text", "generation")}
    assert m["passkey"]["recall"] == m["passkey"]["recall_full"]
    assert m["text"]["kl"] == pytest.approx(0, abs=1e-6)
    assert m["text"]["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert m["text"]["agreement"] == 1
    assert (m["generation"]["same_tokens"], m["generation"]["identical"]) == (6, 1)


@pytest.mark.parametrize("fed", FED)
def test_lossy(fed: str, model: Model) -> None:
    subject = Subject(model, windowed(model), **FED[fed])
    assert run("text", subject).metrics["kl"] > 1e-3
    speed = run("speed", subject)
    assert speed.metrics["bytes_ratio"] < 0.5
    assert speed.metrics["bytes_read"] < speed.metrics["bytes_read_full"] / 2
    assert speed.detail["entries"] == [[14, 14], [14, 14]]


@pytest.mark.parametrize("fed", FED)
def test_drafts(fed: str, model: Model) -> None:
    made = replace(windowed(model), draft=Draft(3))
    subject = Subject(model, made, **FED[fed])
    written = run("generation", subject)
    m = written.metrics
    assert (m["same_tokens"], m["identical"]) == (6, 1)
    assert m["acceptance"] == written.detail["accepted"] / written.detail["proposed"]
    assert m["tokens_per_pass"] == 6 / written.detail["passes"]
    speed, alone = run("speed", subject), run("speed", Subject(model, windowed(model), **FED[fed]))
    m, own = speed.metrics, alone.metrics
    assert m["bytes_held"] == m["bytes_held_full"] + own["bytes_held"]
    assert m["bytes_ratio"] > 1
    assert speed.detail["entries"] == alone.detail["entries"]
    assert m["bytes_read_full"] / 3 < m["bytes_read"] <= m["bytes_read_full"] + 3 * own["bytes_read"]


def test_a_lossless_draft_is_always_accepted(model: Model) -> None:
    subject = Subject(model, Plan("by hand", model.fingerprint, draft=Draft(2)))
    m = run("generation", subject).metrics
    assert (m["acceptance"], m["tokens_per_pass"], m["identical"]) == (1, 3, 1)
    m = run("speed", subject).metrics
    assert m["bytes_ratio"] == 2
    assert m["bytes_read"] == m["bytes_read_full"] * (1 + 2) / 3  # one pass and two drafts for three tokens


def test_bytes_of_the_full_plan(model: Model) -> None:
    result = run("speed", Subject(model, windowed(model, full=True)))
    m = result.metrics
    assert (m["bytes_ratio"], m["bytes_moved"]) == (1.0, 0.0)
    assert m["bytes_read"] == m["bytes_read_full"] == 2 * 4 * 100 * 2 * 2 * 8  # K and V, fp32, tokens, layers, heads, D
    assert m["bytes_held"] == m["bytes_held_full"] >= m["bytes_read"]
    assert all(value > 0 for name, value in m.items() if "seconds" in name or "ratio" in name)


def test_perplexity_is_the_models_own(model: Model) -> None:
    options = SMALL["text"]
    corpus = text(model, tokens=54, samples=2, seed=3, half="held-out")
    ids = torch.stack([sample.tokens for sample in corpus.samples])
    logs = own(model, ids).log_softmax(-1)[:, options["prompt"] - 1 : -1]
    loss = -logs.gather(-1, ids[:, options["prompt"] :, None]).mean()
    result = run("text", Subject(model, windowed(model, full=True), seed=3))
    assert result.metrics["perplexity_full"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result.detail["corpus"]["hash"] == corpus.provenance["hash"]


def test_the_grid_adds_up(model: Model) -> None:
    result = run("passkey", Subject(model, windowed(model)))
    grid = result.detail["grid"]
    points = [(point["length"], round(point["depth"], 1)) for point in grid]
    assert points == [(length, depth) for length in (200, 260) for depth in (0.2, 0.8)]
    assert result.metrics["recall"] == sum(p["plan"] * p["keys"] for p in grid) / sum(p["keys"] for p in grid)
    assert result.detail["prompts"] == 8
    for side in ("full", "plan"):
        low, high = result.detail["interval"][side]
        assert 0 <= low <= high <= 1


@pytest.mark.parametrize("name", ["passkey", "two-hop", "text", "generation", "speed"])
def test_a_plan_that_looks_ahead_is_told_what_follows(name: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many tokens as its cache is fed after the prompt; where nobody tells it, it is refused."""
    told: list[torch.Tensor] = []
    monkeypatch.setattr(SegmentCache, "tell", _noting(SegmentCache.tell, told))
    shape = (model.geometry.layers, model.geometry.kv_heads)
    select = Select(torch.full(shape, 0.5), observe="answer", recent=4)
    keep = Keep.heads(torch.ones(shape), sink=0, recent=1, select=select)
    subject = Subject(model, Plan("by hand", model.fingerprint, keep=keep))
    untold = subject.cache("plan", 9)
    with pytest.raises(InputError, match="nobody said"):
        subject.prefill(untold, torch.zeros(1, 9, dtype=torch.long))
    assert run(name, subject).metrics
    lengths = {"passkey": 5, "text": 6, "generation": 6, "speed": 3}  # digits of a key, tokens, steps; bytes are tokens
    assert told
    if name in lengths:
        assert {tokens.shape[1] for tokens in told} == {lengths[name] + (name == "passkey")}


def _noting(tell: Any, told: list[torch.Tensor]) -> Any:
    def noted(cache: SegmentCache, tokens: torch.Tensor) -> None:
        told.append(tokens)
        tell(cache, tokens)

    return noted


def test_what_order_costs(model: Model) -> None:
    """Each order is judged on its own prompts, and the gap is between them."""
    result = run("order", Subject(model, windowed(model, full=True)))
    m = result.metrics
    assert m["order_gap"] == max(m["order_first"], m["order_twice"]) - m["order_plain"]
    assert {name: m[name] for name in m if not name.endswith("_full")} == {
        name.removesuffix("_full"): value for name, value in m.items() if name.endswith("_full")
    }
    assert {form: found["corpus"]["options"]["form"] for form, found in result.detail.items()} == {
        "plain": "plain", "first": "first", "twice": "twice"
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SMALL if hasattr(task(name), "show")])
def test_tables(name: str, model: Model) -> None:
    columns, rows = task(name).show(run(name, Subject(model, windowed(model))))
    assert rows
    assert {len(row) for row in rows} == {len(columns)}


@pytest.mark.parametrize("name", ["passkey", "text", "generation"])
def test_the_seed_chooses_the_prompts(name: str, model: Model) -> None:
    plan = windowed(model)
    same, again, other = (run(name, Subject(model, plan, seed=seed)) for seed in (0, 0, 1))
    assert (same.metrics, same.detail) == (again.metrics, again.detail)
    assert same.detail != other.detail


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("passkey", {"keys": 0}), ("passkey", {"batch": 0}), ("text", {"prompt": 0}), ("text", {"tokens": 0}),
        ("text", {"samples": -1}), ("generation", {"tokens": 0}), ("speed", {"steps": 0}), ("speed", {"repeats": 0}),
    ],
)  # fmt: skip
def test_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}.*1 or more"):
        task(name).Options(**options)


def test_prefill_of_nothing_is_nothing(model: Model) -> None:
    subject = Subject(model, windowed(model))
    cache = subject.cache("plan", 1)
    subject.prefill(cache, torch.zeros(1, 0, dtype=torch.long))
    assert cache.get_seq_length() == 0


def test_batches_and_halves() -> None:
    assert list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert [half(("default",)), half(("a.txt", "default")), half(("a.txt",))] == ["held-out", "held-out", None]


@pytest.mark.parametrize("fed", FED)
def test_acceptance_of_any_plan(fed: str, model: Model) -> None:
    """What is lossless would draft everything; what is not drafts about what it is accepted in use."""
    m = run("acceptance", Subject(model, windowed(model, full=True), **FED[fed])).metrics
    assert m == {"greedy_acceptance": 1.0, "sampled_acceptance": pytest.approx(1.0, abs=1e-5)}
    lossy = windowed(model)
    m = run("acceptance", Subject(model, lossy, **FED[fed])).metrics
    assert 0 < m["sampled_acceptance"] < 1
    drafting = run("acceptance", Subject(model, replace(lossy, draft=Draft(3)), **FED[fed])).metrics
    assert drafting == m


def test_acceptance_by_hand() -> None:
    full, plan = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    found = task("acceptance").score(full, plan, torch.tensor([1, 0]))
    p = full[0].softmax(-1).tolist()
    assert found == {"acceptance": 0.5, "sampled": pytest.approx((p[0] + 2 * p[2] + 1) / 2)}
    other = {"acceptance": 1.0, "sampled": 1.0}
    assert task("acceptance").tally([found, other])["acceptance"] == 0.75
