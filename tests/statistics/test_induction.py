"""Echo and induction scores: against n×n attention, and on heads whose scores are known (card A3, check b)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool.corpus.base import Sample
from kvtool.corpus.repeat import repeat
from kvtool.model import Model
from kvtool.statistics._base import Rows
from kvtool.statistics.induction import Induction
from tests import models
from tests.models import ECHO, INDUCTION, PREVIOUS, Characters, repeated
from tests.statistics.naive import written_down
from tests.statistics.observed import trace
from tests.tolerance import close

PERIOD, COPIES = 20, 3


def scores(model: Model, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """(echo, induction) [L,H] by the formula: mean over the rows of copies 2, 3, …, the start token's row and column left out."""
    start = len(sample.tokens) % PERIOD
    echo, induction = [], []
    for layer in written_down(model, sample.tokens):
        weights = layer.weights[:, start:, start:]
        rows = range(PERIOD, weights.shape[1])
        earlier = {row: range(row % PERIOD, row, PERIOD) for row in rows}
        echo.append(sum(weights[:, row, list(earlier[row])].sum(-1) for row in rows) / len(rows))
        induction.append(sum(weights[:, row, [j + 1 for j in earlier[row]]].sum(-1) for row in rows) / len(rows))
    return torch.stack(echo), torch.stack(induction)


@pytest.mark.parametrize("start", [False, True], ids=["bare", "start-token"])
def test_against_the_formula(start: bool, any_model: Model) -> None:
    model = dataclasses.replace(any_model, tokenizer=Characters(start=start))
    corpus = repeat(model, period=PERIOD, copies=COPIES, samples=1)
    assert len(corpus.samples[0].tokens) == PERIOD * COPIES + start
    seen = trace(model, {"repeat": corpus}, ["induction"])["induction"]
    echo, induction = scores(model, corpus.samples[0])
    assert float(seen["rows"]) == PERIOD * (COPIES - 1)
    close(seen["echo"] / seen["rows"], echo, torch.float32)
    close(seen["induction"] / seen["rows"], induction, torch.float32)


def one_hot(distance_of_row: list[int]) -> torch.Tensor:
    """Attention [T,T] of a head whose row i looks `distance_of_row[i]` back."""
    weights = torch.zeros(len(distance_of_row), len(distance_of_row))
    for row, distance in enumerate(distance_of_row):
        weights[row, max(0, row - distance)] = 1.0
    return weights


def test_one_hot_heads() -> None:
    """An induction head has (echo, induction) = (0, 1), a previous-token head (0, 0), a head on the same token (1, 0)."""
    model, tokens = models.shared("llama"), PERIOD * COPIES
    heads = [one_hot([back] * tokens) for back in (PERIOD - 1, 1, PERIOD, 2 * PERIOD - 1, 0, 5)]
    weights = torch.stack(heads)
    late = weights.clone()
    late[:, :PERIOD] = 0
    distance = torch.stack([late.diagonal(-d, 1, 2).sum(-1) for d in range(tokens)], dim=1)
    statistic = Induction(model, model.geometry)
    from kvtool_kernels.attention_statistics.reference import Summary

    summary = Summary(torch.empty(0), torch.empty(0), torch.empty(0), distance, torch.empty(0))
    statistic.rows(Rows(0, summary, PERIOD, Sample(repeated(PERIOD, COPIES), "repeat", period=PERIOD)))
    copies = PERIOD * (COPIES - 1)
    assert float(statistic["rows"]) == copies
    echo, induction = statistic["echo"][0] / copies, statistic["induction"][0] / copies
    # looking 2R − 1 back leaves the text for the first rows of copy 2, which then see token 0
    beyond = sum(late[3, row, row - 2 * PERIOD + 1] for row in range(2 * PERIOD - 1, tokens)) / copies
    close(echo, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]), torch.float32)
    assert float(induction[0]) == 1.0
    assert float(induction[3]) >= float(beyond) > 0.5
    assert [float(induction[head]) for head in (1, 2, 4, 5)] == [0.0] * 4


def test_the_induction_model(induction: Model) -> None:
    sample = Sample(repeated(30, 4), "repeat", period=30)
    from kvtool.corpus.base import gather

    seen = trace(induction, {"repeat": gather("repeat", [sample], seed=0, options={})}, ["induction"])["induction"]
    found = seen["induction"] / seen["rows"]
    assert float(found[INDUCTION]) > 1 - 1e-6
    assert float(seen["echo"][INDUCTION] / seen["rows"]) < 1e-6
    assert float(found[PREVIOUS]) < 1e-6
    assert float(seen["echo"][PREVIOUS] / seen["rows"]) < 1e-6
    # this echo head sees its own token too, so of c copies it spends (c − 1)/c on earlier ones
    close(seen["echo"][ECHO] / seen["rows"], torch.tensor((1 / 2 + 2 / 3 + 3 / 4) / 3), torch.float32)
    others = found.clone()
    others[INDUCTION] = 0
    assert float(others.max()) < 0.1
