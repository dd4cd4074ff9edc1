"""Known answers of Scissorhands, card A13."""

from __future__ import annotations

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.methods import scissorhands
from kvtool.methods._base import Context
from tests import models
from tests.laws.methods import trace
from tests.methods.evicting import D, H, K, lane, prompted, select, step
from tests.tolerance import same


def needle(history: int) -> bool:
    """A prompt of 20, then 10 queries of which the first looks at entry 3 and the others at what is newest: is entry 3
    still there when the cache has overflowed?"""
    made = lane(select("scissorhands", budget=30, history=history, recent=history, drop=0.5))
    k = torch.zeros(1, K, 20, D)
    k[..., 3, 0] = 30.0
    held = k
    prompted(made, torch.zeros(1, H, 20, D), k)
    places = torch.arange(20)
    for fed in range(21, 33):
        q, new = torch.zeros(1, H, 1, D), torch.zeros(1, K, 1, D)
        new[..., 1] = 5.0
        q[..., 0 if fed == 25 else 1] = 5.0
        held, places = torch.cat([held, new], 2), torch.cat([places, torch.tensor([fed - 1])])
        index = step(made, q, held, fed)
        held, places = held.gather(2, index[..., None].expand(-1, -1, -1, D)), places[index[0, 0]]
        if fed == 31:
            assert held.shape[2] == 15
    return bool((places == 3).any())


def test_importance_is_remembered_as_long_as_the_history() -> None:
    assert needle(10)
    assert not needle(5)


@pytest.mark.parametrize("entries", [10, 33])
def test_uniform_attention_is_never_below_the_uniform_share(entries: int) -> None:
    """All count alike, so the newest stay."""
    made = lane(select("scissorhands", budget=8, history=4, recent=4))
    kept = prompted(made, torch.zeros(1, H, entries, D), torch.ones(1, K, entries, D))
    same(kept[0, 0], torch.arange(entries - 8, entries))


def test_layers_whose_importance_does_not_persist_keep_more() -> None:
    """Planted: 0.9, 0.5 and all of what matters later has mattered before, so 0.1 : 0.5 : 0 of half the budget."""
    g = models.shared("llama").geometry
    after = torch.full((3, g.query_heads), 10.0).double()
    seen = {"after": after, "both": after * torch.tensor([[0.9], [0.5], [1.0]])}
    context = Context(g, trace={"persistence": seen})  # type: ignore[arg-type]
    for budget, unit in ((120, 1), (0.25, 1024)):
        options = scissorhands.Options(budget=budget, mode="calibrated")
        keep = scissorhands.calibrate(context, options).keep
        assert keep is not None
        assert keep.select is not None
        whole = budget * unit
        expected = torch.tensor([0.5 + 1.5 / 6, 0.5 + 1.5 * 5 / 6, 0.5]) * whole
        assert ((keep.select.budget[:, 0] * unit - expected).abs() <= 1).all()
        assert float(keep.select.budget.mean()) == pytest.approx(budget)


def test_layers_with_windows_of_their_own_neither_give_nor_take() -> None:
    model = models.shared("gemma3")
    plan = calibrate("scissorhands", dict(mode="calibrated", budget=20), trace=trace(model, ("persistence",)))
    assert plan.keep is not None
    assert plan.keep.select is not None
    whole = torch.tensor([window is None for window in model.geometry.windows])
    budget = plan.keep.select.budget[:, 0]
    assert bool((budget[~whole] == 20).all())
    assert float(budget[whole].mean()) == 20


def test_one_budget_needs_no_trace() -> None:
    model = models.shared("llama")
    assert calibrate("scissorhands", {}, model=model).keep is not None
    with pytest.raises(InputError, match="persistence"):
        calibrate("scissorhands", {"mode": "calibrated"}, model=model)
