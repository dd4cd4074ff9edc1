"""Echo and induction scores: against n×n attention, and on heads whose scores are known (card A3, check b)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool.corpus.base import Corpus, Sample, gather
from kvtool.corpus.repeat import repeat
from kvtool.model import Model
from kvtool.statistics._base import Rows
from kvtool.statistics.induction import Induction
from kvtool_kernels.attention_statistics.reference import Summary
from tests.models import ECHO, INDUCTION, PREVIOUS, Characters, repeated
from tests.statistics.naive import written_down
from tests.statistics.observed import trace
from tests.tolerance import close

PERIOD, COPIES = 20, 3


def seen(model: Model, corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    """(echo, induction) [L,H] as the profiler has them."""
    statistic = trace(model, {"repeat": corpus}, ["induction"])["induction"]
    return statistic["echo"] / statistic["rows"], statistic["induction"] / statistic["rows"]


def test_sums_along_diagonals(any_model: Model) -> None:
    corpus = repeat(any_model, period=PERIOD, copies=COPIES, samples=1)
    found = seen(any_model, corpus)
    for layer, record in enumerate(written_down(any_model, corpus.samples[0].tokens)):
        late = record.weights[:, PERIOD:]  # entry (i, j) of it is row PERIOD + i
        for scores, first in zip(found, (PERIOD, PERIOD - 1), strict=True):
            distances = range(first, PERIOD * COPIES, PERIOD)
            total = sum(late.diagonal(PERIOD - distance, 1, 2).sum(-1) for distance in distances)
            close(scores[layer], total / late.shape[1], torch.float32)


@pytest.mark.parametrize("start", [False, True], ids=["bare", "start-token"])
def test_the_published_formula(start: bool, llama: Model) -> None:
    """Mean over the rows of copies 2, 3, …, the start token's row and column left out. Ours is more by what the rows at
    the end of a copy give to the first token, and to the start token: at most 1/R each."""
    model = dataclasses.replace(llama, tokenizer=Characters(start=start))
    corpus = repeat(model, period=PERIOD, copies=COPIES, samples=1)
    tokens = corpus.samples[0].tokens
    assert len(tokens) == PERIOD * COPIES + start
    found, rows = seen(model, corpus), range(PERIOD, PERIOD * COPIES)
    for layer, record in enumerate(written_down(model, tokens)):
        weights = record.weights[:, int(start) :, int(start) :]
        for scores, after in zip(found, (0, 1), strict=True):
            columns = {row: [j + after for j in range(row % PERIOD, row, PERIOD)] for row in rows}
            exact = sum(weights[:, row, columns[row]].sum(-1) for row in rows) / len(rows)
            excess = scores[layer] - exact
            assert float(excess.min()) > -1e-6
            assert float(excess.max()) < (after + start) / PERIOD + 1e-6


def one_hot(back: int, tokens: int) -> torch.Tensor:
    """Attention [T,T] of a head whose every row looks `back` positions back, or at the first token."""
    weights = torch.zeros(tokens, tokens)
    for row in range(tokens):
        weights[row, max(0, row - back)] = 1.0
    return weights


def test_one_hot_heads(llama: Model) -> None:
    """(echo, induction) is (0, 1) for an induction head, (0, 0) for a previous-token head, (1, 0) for an echo head."""
    tokens, rows = PERIOD * COPIES, PERIOD * (COPIES - 1)
    weights = torch.stack([one_hot(back, tokens) for back in (PERIOD - 1, 1, PERIOD, 0, 5)])
    weights[:, :PERIOD] = 0  # rows of the first copy do not count
    distance = torch.stack([weights.diagonal(-d, 1, 2).sum(-1) for d in range(tokens)], dim=1)
    nothing = torch.empty(0)
    statistic = Induction(llama, dataclasses.replace(llama.geometry, query_heads=len(weights)))
    sample = Sample(repeated(PERIOD, COPIES), "repeat", period=PERIOD)
    statistic.rows(Rows(0, Summary(nothing, nothing, nothing, distance, nothing, nothing), PERIOD, sample))
    assert float(statistic["rows"]) == rows
    assert (statistic["echo"][0] / rows).tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert (statistic["induction"][0] / rows).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_induction_model(induction: Model) -> None:
    sample = Sample(repeated(30, 4), "repeat", period=30)
    echo, found = seen(induction, gather("repeat", [sample], seed=0, options={}))
    assert float(found[INDUCTION]) > 1 - 1e-4
    assert float(echo[INDUCTION]) < 1e-4
    assert float(found[PREVIOUS]) < 1e-4
    assert float(echo[PREVIOUS]) < 1e-4
    # this echo head sees its own token too, so of c copies it spends (c − 1)/c on earlier ones
    close(echo[ECHO], torch.tensor((1 / 2 + 2 / 3 + 3 / 4) / 3), torch.float32)
    others = found.clone()
    others[INDUCTION] = 0
    assert float(others.max()) < 0.1
