"""Known answers of Keyformer, card A12."""

from __future__ import annotations

import torch

from tests.methods.evicting import STEP, D, H, K, lane, prompted, random, select, step
from tests.tolerance import close, same


def scores(**settings) -> torch.Tensor:
    made = lane(select("keyformer", **settings))
    draw = torch.Generator().manual_seed(5)
    q, k = torch.randn(1, H, 40, D, generator=draw), torch.randn(1, K, 40, D, generator=draw)
    made.observe(q, 0, k, k, STEP, {})
    return made.scores(made.view(k, k, STEP, {}))


def test_hot_scores_are_uniform_over_what_is_seen() -> None:
    """τ → ∞: column j of n sums to H_n − H_j, whatever the noise."""
    expected = torch.tensor([sum(1 / i for i in range(j + 1, 41)) for j in range(40)])
    close(scores(tau_init=1e9, tau_end=1e9), expected.expand(1, K, -1))


def test_sums_count_queries_and_noise_is_seeded() -> None:
    close(scores().sum(-1), torch.full((1, K), 40.0))
    same(scores(), scores())
    assert not torch.equal(scores(), scores(tau_init=1.1))


def test_noise_moves_the_border_alone() -> None:
    """One entry draws nearly everything, so no noise removes it; among equals, noise decides, and not by age alone."""
    k = torch.zeros(1, K, 60, D)
    k[..., 20, :] = 6.0
    made = lane(select("keyformer", keep=0.3, recent=0.2))
    kept = prompted(made, torch.ones(1, H, 60, D), k)
    assert (kept == 20).any(-1).all()
    assert kept.shape[2] == 18


def test_what_leaves_the_window_is_lost_as_released() -> None:
    """mode=code: every step drops the entry that leaves the window, whatever it scores; mode=paper the one with the
    least score."""
    for mode, place in (("code", 5), ("paper", 2)):
        made = lane(select("keyformer", keep=8, recent=0.375, mode=mode))  # 5 key entries, 3 recent ones
        k = torch.zeros(1, K, 8, D)
        k[..., 2, 0] = -30.0  # the entry that no query likes
        q = torch.zeros(1, H, 1, D)
        q[..., 0] = 1.0
        same(prompted(made, q.expand(-1, -1, 8, -1), k)[0, 0], torch.arange(8))
        held = torch.cat([k, random(1, K, 1, D) * 0.01], 2)
        index = step(made, q, held, 9)
        same(index[0, 0], torch.tensor([at for at in range(9) if at != place]))


def test_less_than_one_recent_entry_is_none_and_no_share_of_the_prompt() -> None:
    """3 entries, 0.9 of which would be recent: the best three stay, not the newest."""
    made = lane(select("keyformer", keep=3, recent=0.3))
    k = torch.zeros(1, K, 60, D)
    k[..., [10, 20, 30], :] = 6.0
    kept = prompted(made, torch.ones(1, H, 60, D), k)
    same(kept, torch.tensor([10, 20, 30]).expand(1, K, -1))
