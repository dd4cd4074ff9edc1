"""TOVA's planted case: what the newest query looks at stays, in all heads of a layer."""

from __future__ import annotations

import torch

from tests.methods.evicting import D, H, K, lane, prompted, select, step
from tests.tolerance import same


def test_the_newest_query_alone_decides() -> None:
    """Of 12 entries the last query of one head looks at entries 2 and 7; all before it looked at entry 4."""
    made = lane(select("tova", budget=3))
    k = torch.zeros(1, K, 12, D)
    k[..., 4, 0] = 20.0
    k[:, 1, 2, 1] = k[:, 1, 7, 1] = 20.0
    q = torch.zeros(1, H, 12, D)
    q[:, :, :-1, 0] = 1.0
    q[:, 3, -1, 1] = 1.0
    kept = prompted(made, q, k)
    same(kept, torch.tensor([2, 7, 11]).expand(1, K, -1))
    held = torch.cat([k[:, :, [2, 7, 11]], torch.zeros(1, K, 1, D)], 2)
    held[..., 1, :] = -20.0
    same(step(made, torch.ones(1, H, 1, D), held, 13), torch.tensor([0, 2, 3]).expand(1, K, -1))
