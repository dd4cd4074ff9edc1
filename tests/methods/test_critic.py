"""Known answers of CRITIC, card A22."""

from __future__ import annotations

import pytest
import torch

from kvtool.errors import InputError
from tests.methods.evicting import STEP, D, H, K, lane, prompted, random, select
from tests.tolerance import close, same


def test_attention_alone_is_heavy_hitters_without_a_window() -> None:
    q, k = random(1, H, 30, D), random(1, K, 30, D)
    made = lane(select("critic", ratio=0.5, minimum=1, attention=1.0, entropy=0.0, gradient=0.0))
    other = lane(select("h2o", heavy=0.5, recent=0.0))
    for each in (made, other):
        each.observe(q, 0, k, k, STEP, {})
    mixed = made.scores(made.view(k, k, STEP, {}))
    sums = other.scores(other.view(k, k, STEP, {})).sum(1)
    close(mixed[:, 0], (sums - sums.min()) / (sums.max() - sums.min()))


@pytest.mark.parametrize(
    ("entries", "minimum", "ratio", "count"), [(40, 30, 0.5, 30), (40, 9, 0.5, 20), (8, 9, 0.5, 8)]
)
def test_sizes(entries: int, minimum: int, ratio: float, count: int) -> None:
    made = lane(select("critic", ratio=ratio, minimum=minimum, alpha=0.0))
    made.observe(random(1, H, entries, D), 0, random(1, K, entries, D), random(1, K, entries, D), STEP, {})
    assert min(entries, made.limits(entries)[0]) == count


def test_memory_pressure() -> None:
    assert float(select("critic", ratio=0.3, alpha=0.5, pressure=0.4, minimum=1).budget[0, 0]) == pytest.approx(0.5)
    assert float(select("critic", ratio=0.3, alpha=2.0, pressure=0.9, minimum=1).budget[0, 0]) == pytest.approx(0.1)
    with pytest.raises(InputError, match="weights"):
        select("critic", attention=0.5)


def test_the_gradient_finds_what_changed_the_output() -> None:
    """The last two queries differ only in what they pay entry 6, so it alone has a gradient that matters."""
    made = lane(select("critic", ratio=0.85, alpha=0.0, minimum=1, attention=0.0, entropy=0.0, gradient=1.0))
    k, v = torch.zeros(1, K, 20, D), torch.zeros(1, K, 20, D)
    k[..., 6, 0], v[..., 6, :] = 4.0, 3.0
    q = torch.zeros(1, H, 20, D)
    q[:, :, -1, 0] = 4.0
    same(prompted(made, q, k, v), torch.tensor([6, 18, 19]).expand(1, K, -1))
