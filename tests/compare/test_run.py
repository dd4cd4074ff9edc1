"""The race: who adopts the shared prefill is judged as if fed alone; an interrupt or a failure costs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.compare import run
from kvtool.compare.cells import Cell
from kvtool.compare.journal import Journal, Key
from kvtool.compare.plans import Entrant
from kvtool.compare.prompts import Prompt, asks
from kvtool.compare.run import Race, Rules, key
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.replay.verdict import task
from tests.cache.test_onward import going
from tests.replay.conftest import windowed
from tests.tolerance import close

Start = Callable[..., Race]
TIMES = ("seconds", "ratio")


def few(made: list[Prompt]) -> list[Prompt]:
    """A text and a passkey."""
    return made[:2]


def timeless(scores: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """What does not depend on the clock."""
    return {
        at: {k: v for k, v in found.items() if not any(word in k for word in TIMES)} for at, found in scores.items()
    }


@pytest.fixture(scope="module")
def whole(
    model: Model, made: list[Prompt], field: list[Entrant], tmp_path_factory: pytest.TempPathFactory
) -> dict[Key, dict[str, Any]]:
    """The scores of everybody on everything, from one undisturbed race."""
    steps: list[str] = []
    started = Race(
        model, field, Journal(tmp_path_factory.mktemp("whole") / "board.jsonl", "tiny"), Rules(steps=4), steps.append
    )
    units = started.units(made)
    started.run(made)
    assert len(steps) == units
    assert started.failed == {}
    assert started.units(made) == 0
    return started.journal.scores


def test_everybody_answers_everything(
    whole: dict[Key, dict[str, Any]], made: list[Prompt], field: list[Entrant]
) -> None:
    assert set(whole) == {key(p, ask, e) for p in made for ask in asks(p, ("known", "after")) for e in field}


def test_the_full_cache_is_the_full_cache(whole: dict[Key, dict[str, Any]]) -> None:
    for found in (found for at, found in whole.items() if at[2] == "full"):
        assert found["bytes"] == found["bytes_full"]
        assert found["read"] == found["read_full"]
        if "kl" in found["scores"]:
            assert found["scores"]["agreement"] == 1
            close(torch.tensor(found["scores"]["kl"]), torch.tensor(0.0))


@pytest.mark.parametrize("ask", ["known", "after"])
def test_an_adopted_prefill_is_ones_own(
    ask: str, whole: dict[Key, dict[str, Any]], made: list[Prompt], field: list[Entrant], model: Model
) -> None:
    """Bytes and scores are those of a cache that was fed the same part of the prompt, and decoded step by step."""
    for prompt in (prompt for prompt in few(made) if ask in asks(prompt, (ask,))):
        assert prompt.sample.answer is not None
        end, answer = prompt.end(ask), prompt.sample.answer
        for entrant in field[1:]:
            logits, held = [], []
            for plan in (None, entrant.plan):
                cache = SegmentCache(model, plan, prompt_length=end)
                rows = []
                with model.served(), torch.no_grad():
                    model.network(input_ids=prompt.sample.tokens[None, :end], past_key_values=cache)
                    cache.finish()
                    held.append(cache.nbytes)
                    for token in prompt.follow(ask):
                        rows.append(model.network(input_ids=token.view(1, 1), past_key_values=cache).logits[0])
                logits.append(torch.cat(rows)[-len(answer) :])
            found = whole[key(prompt, ask, entrant)]
            assert found["bytes"] == held[1]
            expected = task(prompt.task).score(*logits, answer)
            close(torch.tensor(list(found["scores"].values())), torch.tensor(list(expected.values())))


def test_real_steps_agree_with_forced_ones(whole: dict[Key, dict[str, Any]], field: list[Entrant]) -> None:
    gaps = [found["forced_gap"] for found in whole.values() if "forced_gap" in found]
    assert len(gaps) == 2 * len(field)  # on the first prompt of each length
    close(torch.tensor(gaps), torch.zeros(len(gaps)))


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_an_interrupted_race_ends_as_an_undisturbed_one(
    stop: int, race: Start, whole: dict[Key, dict[str, Any]], made: list[Prompt], field: list[Entrant]
) -> None:
    parted, calls = race(entrants=field[:3], steps=4), 0

    def progress(text: str) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    parted.progress = progress
    units = parted.units(few(made))
    with pytest.raises(KeyboardInterrupt):
        parted.run(few(made))
    again = race(entrants=field[:3], steps=4)
    assert len(again.journal.scores) == stop
    assert again.units(few(made)) == units - stop > 0
    again.run(few(made))
    assert len(again.journal.scores) == units
    assert timeless(again.journal.scores) == timeless({at: whole[at] for at in again.journal.scores})


def test_more_entrants_and_prompts_join_a_finished_race(
    race: Start, whole: dict[Key, dict[str, Any]], made: list[Prompt], field: list[Entrant]
) -> None:
    race(entrants=field[:2], steps=4).run(made[:1])
    second = race(entrants=field[:3], steps=4)
    assert len(second.journal.scores) == 2
    second.run(few(made))
    assert len(second.journal.scores) == 9
    assert timeless(second.journal.scores) == timeless({at: whole[at] for at in second.journal.scores})


def test_who_fails_is_out_and_the_others_go_on(
    race: Start, whole: dict[Key, dict[str, Any]], made: list[Prompt], field: list[Entrant],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    victim, calls = field[1], 0
    judge = Race._judge

    def broken(self: Race, prompt: Prompt, ask: str, entrant: Entrant, *rest: Any) -> dict[str, Any]:
        nonlocal calls
        if entrant is victim:
            calls += 1
            if calls == 2:
                raise RuntimeError("no such kernel\nand more")
        return judge(self, prompt, ask, entrant, *rest)

    monkeypatch.setattr(Race, "_judge", broken)
    started = race(entrants=field[:3], steps=4)
    started.run(few(made))
    assert started.failed == {victim.cell.key: "RuntimeError: no such kernel"}
    assert calls == 2
    others = {at for at in whole if at[0] in {p.key for p in few(made)} and at[2] in ("full", field[2].cell.key)}
    rest = {at: found for at, found in started.journal.scores.items() if at[2] != victim.cell.key}
    assert set(rest) == others
    assert timeless(rest) == timeless({at: whole[at] for at in others})
    monkeypatch.setattr(Race, "_judge", judge)
    again = race(entrants=field[:3], steps=4)
    again.run(few(made))
    assert again.failed == {}
    assert again.units(few(made)) == 0


def test_who_is_in_trouble_does_not_start(race: Start, made: list[Prompt], field: list[Entrant]) -> None:
    out = Entrant(Cell("broken", "method"), trouble="it was never well")
    started = race(entrants=[field[0], out])
    started.run(made[:1])
    assert started.failed == {"broken": "it was never well"}
    assert {at[2] for at in started.journal.scores} == {"full"}


def test_a_strict_race_feeds_everybody(race: Start, made: list[Prompt], model: Model, field: list[Entrant]) -> None:
    """Strictly, a window acts within prefill: another number than the official one's, and the same as stepping."""
    plan = windowed(model, recent=20)
    entrant = Entrant(Cell("windowed", "plan"), plan, "windowed")
    found = {}
    for protocol in ("official", "strict"):
        started = race(protocol, entrants=[field[0], entrant], protocol=protocol, chunk=50)
        started.run(made[:1])
        found[protocol] = started.journal.scores[key(made[0], "known", entrant)]
    assert found["official"]["bytes"] == found["strict"]["bytes"]
    assert not math.isclose(found["official"]["scores"]["loss"], found["strict"]["scores"]["loss"], rel_tol=1e-3)


def test_one_record_serves_all_plans(model: Model, field: list[Entrant]) -> None:
    plans: list[Plan] = [entrant.plan for entrant in field if entrant.plan is not None]
    full = SegmentCache(model)
    run.record(full, plans)
    assert {layer.record for layer in full.segments} == {METHOD_WINDOW}
    run.record(full, plans[1:])
    assert {layer.record for layer in full.segments} == {0}


METHOD_WINDOW = 4  # of snapkv, in conftest


def entrant(name: str, model: Model, **values: Any) -> Entrant:
    return Entrant(Cell(name, "method"), calibrate(name, values, model=model), identity=name)


def test_a_prompt_that_wants_it_is_fed_at_once(race: Start, made: list[Prompt], model: Model) -> None:
    """So that no pattern is chosen by the queries of a chunk alone, and no token sent on by them."""
    each = [entrant("zipvl", model, tau=0.5, prefill="sparse", block=16, local=4),
            entrant("dhsa", model, mode="vertical-slash", budget=0.2, block=16, local=4, dense=4),
            Entrant(Cell("going", "method"), going(model, 1.0, 0.5), identity="going")]  # fmt: skip
    found = []
    for chunk in (0, 37):
        started = race(f"chunk{chunk}", entrants=each, chunk=chunk, steps=0)
        started.run(few(made))
        assert started.failed == {}
        found.append(timeless(started.journal.scores))
    assert found[0] == found[1]


def test_a_question_is_asked_in_one_piece(race: Start, made: list[Prompt], model: Model) -> None:
    """Under a plan that reads what it asks for; its answer follows step by step."""
    asking = entrant("rekv", model, budget=0.1, unit=4, asked=300, sink=2, recent=8, slow=False)
    prompt = next(prompt for prompt in made if prompt.task == "needle")
    started = race("asked", entrants=[asking], steps=0)
    started.run([prompt])
    tokens, answer, end = prompt.sample.tokens, prompt.sample.answer, prompt.end("after")
    assert answer is not None
    logits = []
    for plan in (None, asking.plan):
        cache = SegmentCache(model, plan, prompt_length=end)
        with model.served(), torch.no_grad():
            model.network(input_ids=tokens[None, :end], past_key_values=cache)
            cache.finish()
            model.network(input_ids=tokens[None, end:-1], past_key_values=cache)
            rows = [
                model.network(input_ids=token.view(1, 1), past_key_values=cache).logits[0]
                for token in torch.cat([tokens[-1:], answer[:-1]])
            ]
        logits.append(torch.cat(rows))
    expected = task(prompt.task).score(*logits, answer)
    found = started.journal.scores[key(prompt, "after", asking)]["scores"]
    close(torch.tensor(list(found.values())), torch.tensor(list(expected.values())))
    assert all(
        lane.reader.asking.held.shape[3] == len(tokens) - 1 - end  # and nothing of the prompt before it
        for layer in cache.segments for lane in layer.lanes()
    )  # fmt: skip
