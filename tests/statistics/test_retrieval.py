"""The retrieval score: against a naive greedy decode, and on the induction model (card A1)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool.corpus.base import Sample, gather
from kvtool.model import Model
from kvtool.statistics._base import Copying, Statistic
from kvtool.statistics.retrieval import Retrieval
from tests import models
from tests.corpora import needle
from tests.models import INDUCTION, repeated
from tests.statistics.naive import written_down
from tests.statistics.observed import trace
from tests.tolerance import close, same


def seen(model: Model, *samples: Sample) -> Statistic:
    return trace(model, {"needle": gather("needle", samples, seed=0, options={})}, ["retrieval"])["retrieval"]


def naive(model: Model, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """(score, steps) [L,H] from whole forward passes, one per generated token."""
    ids, prompt = sample.tokens, sample.tokens
    needle = {position for start, stop in sample.evidence for position in range(start, stop)}
    g = model.geometry
    copied: dict[tuple[int, int], list[int]] = {
        (layer, head): [] for layer in range(g.layers) for head in range(g.query_heads)
    }
    assert sample.answer is not None
    for _ in range(len(sample.answer) + 2):
        with torch.no_grad():
            token = int(model.network(input_ids=ids[None]).logits[0, -1].argmax())
        for layer, record in enumerate(written_down(model, ids)):
            for head, best in enumerate(record.weights[:, -1].argmax(-1).tolist()):
                if best in needle and int(prompt[best]) == token:
                    copied[layer, head].append(best)
        ids = torch.cat([ids, torch.tensor([token])])
    score, steps = torch.zeros(g.layers, g.query_heads), torch.zeros(g.layers, g.query_heads)
    for (layer, head), places in copied.items():
        score[layer, head] = len(set(places)) / len(needle)
        steps[layer, head] = len(places) / len(needle)
    return score, steps


def continuation(model: Model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy, by the model alone."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model.network(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
    return ids[-count:]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "gemma2", "induction"])
def test_against_whole_forward_passes(name: str) -> None:
    """The answer is what the model says, so every prompt counts; the needle is all of the prompt, so heads hit it."""
    model = models.induction_model() if name == "induction" else models.shared(name)
    ids = torch.cat([repeated(12, 2), repeated(12, 1)[:5]])
    if name != "induction":  # let the prompt hold what the model will say
        ids[3:9] = continuation(model, ids, 6)
    sample = Sample(ids, "needle", answer=continuation(model, ids, 6), evidence=((0, 10), (11, len(ids))))
    statistic, (score, steps) = seen(model, sample), naive(model, sample)
    assert float(statistic["counted"]) == 1
    close(statistic["score"], score, torch.float32)
    close(statistic["steps"], steps, torch.float32)


def test_the_induction_head_scores_one_and_all_others_zero(induction: Model) -> None:
    corpus = needle(induction, samples=4)
    statistic = seen(induction, *corpus.samples)
    assert float(statistic["counted"]) == float(statistic["prompts"]) == 4
    expected = torch.zeros_like(statistic["score"])
    expected[INDUCTION] = 1.0
    same(statistic["score"] / statistic["counted"], expected)


def test_a_first_token_from_elsewhere_costs_one(induction: Model) -> None:
    """A prompt that ends elsewhere than before the needle: the first needle token is not copied."""
    sample = needle(induction, samples=1, size=12).samples[0]
    start, stop = sample.evidence[0]
    later = torch.cat(
        [sample.tokens[:-1], sample.tokens[start : start + 1]]
    )  # now it ends with the needle's first token
    statistic = seen(induction, dataclasses.replace(sample, tokens=later))
    assert float(statistic["score"][INDUCTION]) == pytest.approx((stop - start - 1) / (stop - start))


def test_a_needle_with_a_repeated_token_does_not_exceed_one(induction: Model) -> None:
    hay = repeated(40, 1)
    hay[12], hay[16] = hay[11], hay[17]
    sample = Sample(torch.cat([hay, hay[9:10]]), "needle", answer=hay[10:20], evidence=((10, 20),))
    statistic = seen(induction, sample)
    assert float(statistic["score"].max()) <= 1.0
    assert bool((statistic["steps"] >= statistic["score"]).all())


def test_a_prompt_that_was_not_answered_does_not_count(induction: Model) -> None:
    sample = needle(induction, samples=1).samples[0]
    other = dataclasses.replace(sample, answer=torch.arange(100, 112))
    statistic = seen(induction, other)
    assert (float(statistic["prompts"]), float(statistic["counted"]), float(statistic["score"].sum())) == (1, 0, 0)


def test_mass_is_what_is_paid_to_the_whole_needle_while_it_is_copied() -> None:
    """Against whole forward passes, one per generated token."""
    model = models.induction_model()
    sample = needle(model, samples=1, size=6).samples[0]
    (start, stop), g = sample.evidence[0], model.geometry
    assert sample.answer is not None
    expected, ids, copies = torch.zeros(g.layers, g.query_heads).double(), sample.tokens, 0
    for token in continuation(model, ids, len(sample.answer) + 2).tolist():
        if token in sample.tokens[start:stop].tolist():
            copies += 1
            for layer, record in enumerate(written_down(model, ids)):
                expected[layer] += record.weights[:, -1, start:stop].double().sum(-1)
        ids = torch.cat([ids, torch.tensor([token])])
    assert copies == len(sample.answer)
    assert float(expected[INDUCTION]) > 0.9 * copies
    close(seen(model, sample)["mass"], expected, torch.float32)


@pytest.mark.parametrize(("needle_length", "wins"), [(20, "mass"), (1, "score")])
def test_a_head_that_sees_all_of_a_long_needle_beats_one_that_points(needle_length: int, wins: str) -> None:
    """Card CompressKV: uniform over the needle, nine tenths of its attention, against one tenth on the token copied."""
    geometry = models.shared("llama").geometry
    statistic = Retrieval(None, geometry)
    prompt, start = torch.arange(60), 10
    sample = Sample(prompt, "needle", answer=prompt[start : start + needle_length],
                    evidence=((start, start + needle_length),))  # fmt: skip
    statistic.begin(sample)
    for step in range(needle_length):
        attention = torch.zeros(geometry.layers, geometry.query_heads, 60)
        attention[:, 0, start : start + needle_length] = (
            0.05 / needle_length if wins == "score" else 0.9 / needle_length
        )
        attention[:, 0, 59] = 1.0 - attention[:, 0].sum(-1)
        attention[:, 1, start + step] = 0.6
        attention[:, 1, 0] = 0.4
        statistic.step(Copying(attention, start + step, prompt))
    statistic.end(sample, sample.answer)
    spread, pointing = statistic["mass"][0, :2].tolist()
    assert (spread > pointing) == (wins == "mass")
    assert float(statistic["score"][0, 1]) > float(statistic["score"][0, 0])
