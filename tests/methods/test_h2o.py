"""Known answers of H2O, card A11; sums over uniform attention are in tests/cache/keep/test_selector.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from tests import models
from tests.methods.evicting import D, H, K, lane, prompted, random, select, step
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same


def test_without_heavy_hitters_it_is_a_sliding_window() -> None:
    """A step sees the entries that stayed and its own."""
    model, ids, chunks = models.shared("llama"), random_ids(2, 30, seed=3), [18, *[1] * 12]
    plan = calibrate("h2o", dict(heavy=0, recent=6), model=model)
    window = calibrate("streaming", dict(sink=0, recent=7, position="original"), model=model)
    got = feed(model, SegmentCache(model, plan), ids, chunks)
    close(got, feed(model, SegmentCache(model, window), ids, chunks))


def test_a_heavy_hitter_stays_until_others_outweigh_it() -> None:
    """Entry 5 draws nearly all attention in the prompt; then queries look at entry 9, and nothing that has left comes
    back."""
    made = lane(select("h2o", heavy=1, recent=2))
    k = torch.zeros(1, K, 12, D)
    k[..., 5, 0] = k[..., 9, 1] = 30.0
    q = torch.zeros(1, H, 12, D)
    q[..., 0] = 1.0
    same(prompted(made, q, k)[0, 0], torch.tensor([5, 10, 11]))
    held = k[:, :, [5, 10, 11]]
    towards = torch.zeros(1, H, 1, D)
    towards[..., 1] = 1.0
    for fed in range(13, 40):
        held = torch.cat([held, random(1, K, 1, D) * 0.01], 2)
        index = step(made, towards, held, fed)
        assert int(index[0, 0, 0]) == 0
        held = held.gather(2, index[..., None].expand(-1, -1, -1, D))
    assert held.shape[2] == 3


def test_sizes_in_bulk() -> None:
    model = models.shared("llama")
    plan = calibrate("h2o", dict(heavy=0.2, recent=0.2, bulk=4), model=model)
    cache = SegmentCache(model, plan)
    sizes = []
    ids = random_ids(1, 40, seed=4)
    with model.served(), torch.no_grad():
        model.network(input_ids=ids[:, :20], past_key_values=cache)
        for at in range(20, 40):
            model.network(input_ids=ids[:, at : at + 1], past_key_values=cache)
            sizes.append(int(cache.entries()[0, 0]))
    assert set(sizes) == {5, 6, 7, 8}


@pytest.mark.parametrize("bad", [dict(heavy=0.8, recent=0.4), dict(heavy=-0.1), dict(heavy=0, recent=0),
                                 dict(heavy=30, recent=0.5)], ids=str)  # fmt: skip
def test_bad_shares(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="heavy or recent"):
        select("h2o", **bad)
