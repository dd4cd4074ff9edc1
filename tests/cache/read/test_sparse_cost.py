"""What a sparse prefill saves: entries that queries meet, counted, and as the ledger says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtool.cache.read import chosen as chosen_module
from kvtool.slots import Prefill
from tests.cache.read.prefilling import BASE, D, G, K, N, draw, reads, sparse


def test_operations_and_memory_follow_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No query meets more entries than its block reads, and nothing of a prompt's length squared is made."""
    tokens, block, local, budget = 2000, 64, 32, 200
    spec = Prefill(torch.tensor([float(budget)]), block=block, local=local, dense=block)
    met = []
    true = chosen_module.attend

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any):
        met.append((q.shape[2] * k.shape[2], q.shape[2] * (q.shape[2] - 1) // 2))  # what is computed, and masked of it
        assert options["bias"] is None
        return true(q, k, v, **options)

    monkeypatch.setattr(chosen_module, "attend", counted)
    q, k, v = draw(1, K * G, tokens, D), draw(1, K, tokens, D, seed=1), draw(1, K, tokens, D, seed=2)
    sparse(q, k, v, spec, [[0, 1]])
    assert spec.seen(0, tokens) == sum(computed - hidden for computed, hidden in met)
    assert sum(computed for computed, _ in met) < 0.2 * tokens**2


@pytest.mark.parametrize("options", [{}, dict(local=0, sink=9), dict(dense=0, block=7), dict(local=30, budget=4.0)])
def test_what_the_ledger_says_is_read(options: dict[str, Any]) -> None:
    spec = Prefill(**dict(budget=torch.tensor([13.0])) | BASE | {k: v for k, v in options.items() if k != "budget"})
    q, k = draw(K * G, N, D), draw(K, N, D, seed=1)
    lines = reads(spec, q, k, 13)[0]
    assert spec.seen(0, N) == sum(map(len, lines))
    assert replace(spec, budget=torch.tensor([1.0])).seen(0, N) == N * (N + 1) // 2
