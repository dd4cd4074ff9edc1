"""Known answers of Scissorhands, card A13."""

from __future__ import annotations

import pytest
import torch

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
