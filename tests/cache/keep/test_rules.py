"""Picks, scores and budgets that serve rules which merge, against definitions that go entry by entry."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kvtool.cache.keep.budgets import density, outside
from kvtool.cache.keep.budgets._base import Ballot
from kvtool.cache.keep.picks._base import Choice
from kvtool.cache.keep.scores import global_local
from kvtool.cache.keep.scores._base import probabilities
from tests.cache.keep.merging import B, G, K, S, view
from tests.tolerance import close, same

OPEN, CLOSE = ((1, 2),), ((3,),)


# picks


def test_a_share_of_the_places_is_for_the_newest() -> None:
    entries = view(11, pick="split", sink=2, settings={"newest": 0.25})
    scores = torch.arange(S, 0, -1.0).expand(B, K, -1)
    index = entries.spec.rule("pick").pick(Choice(entries, scores, 12, slice(2, S), scores))
    same(index[0, 0], torch.tensor([*range(9), 21, 22, 23]))


def test_the_order_of_scores_is_not_their_ranks() -> None:
    """Card Elastic Cache: entry i stays if the entry with the i-th smallest score has a number above f."""
    entries = view(12, pick="permuted", sink=2, recent=1, settings={"distance": 3})
    scores = torch.tensor([9.0, 9.0, 3.0, 1.0, 5.0, 4.0, 2.0, 6.0, 9.0]).expand(1, 1, -1)
    index = entries.spec.rule("pick").pick(Choice(entries, scores, 6, slice(2, 8), scores))
    # the six in between, by score: entries 1, 4, 0, 3, 2, 5; three are to leave, and those at 1 and 5 are above 3
    same(index[0, 0], torch.tensor([0, 1, 3, 7, 8]))
    rising = torch.arange(9.0).expand(1, 1, -1)
    index = entries.spec.rule("pick").pick(Choice(entries, rising, 6, slice(2, 8), rising))
    same(index[0, 0], torch.tensor([0, 1, 6, 7, 8]))  # where order and ranks are one, only one is missing


# scores and budgets


def test_global_and_local_importance() -> None:
    entries = view(13, settings={"window": 5})
    got = global_local.score(entries)
    p = torch.cat([block for _, block in probabilities(entries)], 2)
    for b in range(B):
        for h in range(K * G):
            everywhere = [float(p[b, h, j:, j].mean()) for j in range(S)]
            lately = [float(p[b, h, -5:, j].sum()) for j in range(S)]
            means = [sum(x[: S - 4]) / (S - 4) for x in (everywhere, lately)]
            expected = [g / means[0] + late / means[1] for g, late in zip(everywhere, lately, strict=True)]
            close(got[b, h], torch.tensor(expected))


def test_densities() -> None:
    """Card D2O: min–max over heads; equal heads are 0, not 0/0."""
    close(density.density(torch.tensor([1.0, 3.0, 2.0])), torch.tensor(0.5))
    close(density.density(torch.tensor([1.0, 1.0, 1.0, 5.0])), torch.tensor(0.25))
    assert float(density.density(torch.full((4,), 2.0))) == 0.0


def ballots(*densities: list[float], limit: int = 6) -> list[Ballot]:
    """Layers whose heads' payments have these variances."""
    found = []
    for layer, variances in enumerate(densities):
        entries = view(14, layer=layer, rows=1)
        line = torch.linspace(-1, 1, S)
        line = line / line.std()
        entries.__dict__["paid"] = torch.tensor(variances).sqrt()[None, :, None] * line
        found.append(Ballot(entries, torch.zeros(1, K, S), [limit] * K, slice(0, S)))
    return found


def test_even_layers_keep_more() -> None:
    """Card D2O: weights softmax(−F) times the number of layers; a peaked head beside flat ones gives a low F."""
    made = ballots([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 9], [0, 9, 9, 9, 9, 9])
    assert density.deal(made)[0] == [round(6 * 3 * weight) for weight in [0.4418] * 3]
    weights = [math.exp(-f) for f in (0, 1 / 6, 5 / 6)]
    assert density.deal(made) == [[round(6 * 3 * w / sum(weights))] * K for w in weights]


def test_layers_that_stay_whole_and_the_least_that_a_layer_keeps() -> None:
    made = ballots([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1])
    made[0] = replace(made[0], limits=[2**30] * K)
    assert density.deal(made) == [[2**30] * K, [6] * K]
    assert density.deal(ballots([1, 2, 1, 1, 1, 1], limit=0)) == [[1] * K]
    assert density.deal([replace(x, limits=[20] * K) for x in ballots([1] * 6, [0, 9, 9, 9, 9, 9])])[0] == [S] * K


def test_what_lies_outside_of_spans_sets_the_limit() -> None:
    entries = view(15, rows=1, score="outside", settings={"open": OPEN, "close": CLOSE})
    tokens = torch.full((S,), 9)
    scores = torch.zeros(1, K, S)

    def limits(row: torch.Tensor, limit: int) -> list[int]:
        seen = replace(entries, tags={"tokens": row.expand(1, K, -1)})
        return outside.deal([Ballot(seen, scores, [limit] * K, slice(0, S - 4))])[0]

    assert limits(tokens, 8) == [S] * K  # no span, nothing leaves
    tokens[3], tokens[4], tokens[14] = 1, 2, 3
    assert limits(tokens, 8) == [S - 9] * K  # nine entries between the markers
    assert limits(tokens, 21) == [21] * K
    tokens[14] = 9  # never closed
    assert limits(tokens, 8) == [9] * K


def test_outside_comes_first_and_attention_decides_within() -> None:
    entries = view(16, score="outside", settings={"open": OPEN, "close": CLOSE})
    tokens = torch.full((B, S), 9)
    tokens[0, 2:4] = torch.tensor([1, 2])
    tokens[1, 5], tokens[1, 6], tokens[1, 20] = 1, 2, 3
    seen = replace(entries, tags={"tokens": tokens[:, None].expand(-1, K, -1)})
    scores = entries.spec.rule("score").score(seen)
    spans = torch.zeros(B, 1, S, dtype=torch.bool)
    spans[0, :, 4:], spans[1, :, 7:20] = True, True
    spans = spans.expand(-1, K * G, -1)
    assert float(scores[~spans].min()) > float(scores[spans].max())
    for row in range(B):
        for mask in (spans[row, 0], ~spans[row, 0]):
            same(scores[row][:, mask].argsort(-1), seen.paid[row][:, mask].argsort(-1))
