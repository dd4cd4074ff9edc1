"""Known answers of KVCrush, card A14."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.picks._base import Choice, best
from kvtool.cache.keep.picks.representatives import distances, pick, signatures, spaced
from kvtool.cache.keep.scores._base import View
from kvtool.slots import Select
from tests.methods.evicting import D, random
from tests.tolerance import same

BITS = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 0]])  # 0000, 1111, 0101, 1010 down the columns


def choice(scores: torch.Tensor, count: int, free: slice, **settings) -> Choice:
    settings = {"share": 0.5, "anchor": "alternate", "spacing": "linspace"} | settings
    k = torch.zeros(*scores.shape, D)
    spec = Select(torch.ones(1, scores.shape[1]), settings=settings)
    heads = list(range(scores.shape[1]))
    view = View(k, torch.arange(k.shape[2]), k, k, 1.0, None, spec, 0, heads)
    return Choice(view, scores, count, free, scores)


def test_distances_and_both_spacings() -> None:
    scores = BITS[None].float()
    same(signatures(scores)[0], BITS.bool())
    distance = distances(choice(scores, 2, slice(0, 4)))
    same(distance[0], torch.tensor([2, 2, 0, 4]))
    order = torch.argsort(distance[0], stable=True)
    same(order, torch.tensor([2, 0, 1, 3]))
    same(order[spaced(4, 2, "linspace")], torch.tensor([2, 3]))
    same(order[spaced(4, 2, "step")], torch.tensor([2, 1]))


def test_no_representatives_is_the_scorer() -> None:
    scores = random(2, 3, 50)
    made = choice(scores, 20, slice(2, 45), share=0.0)
    same(pick(made), best(scores, 20, slice(2, 45)))


@pytest.mark.parametrize("anchor", ["alternate", "zeros", "ones", "random", "mean"])
@pytest.mark.parametrize("spacing", ["linspace", "step"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_is_picked(anchor: str, spacing: str, share: float) -> None:
    """The right number, each once, in order, with what always stays and the best of the rest of the budget."""
    scores = random(1, 3, 50)
    found = pick(choice(scores, 20, slice(2, 45), share=share, anchor=anchor, spacing=spacing))
    assert found.shape == (1, 3, 20)
    assert (found.diff(dim=-1) > 0).all()
    sure = best(scores, 7 + 13 - round(share * 13), slice(2, 45))
    assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(sure[0], found[0], strict=True))
