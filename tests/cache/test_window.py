"""A head with a window: what one kernel attends over is what blocks of rows do."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.window import Window
from tests.tolerance import close

K, G, D = 2, 3, 16


def fed(pieces: list[int], sink: int, recent: int) -> list[torch.Tensor]:
    """Partial results of a strict window that is fed pieces of one prompt."""
    draw = torch.Generator().manual_seed(5)
    q = torch.randn(2, K * G, sum(pieces), D, generator=draw)
    k, v = (torch.randn(2, K, sum(pieces), D, generator=draw) for _ in range(2))
    lane, start, results = Window(list(range(K)), sink=sink, recent=recent), 0, []
    for new in zip(q.split(pieces, 2), k.split(pieces, 2), v.split(pieces, 2), strict=True):
        results += lane.step(*new, Step(start, D**-0.5, softcap=5.0, strict=True))
        start += new[0].shape[2]
    return results


@pytest.mark.parametrize("pieces", [[40], [5, 35], [9, 9, 22], [40, 1]])
@pytest.mark.parametrize(("sink", "recent"), [(4, 8), (0, 1), (30, 6)])
def test_one_kernel_is_blocks_of_rows(
    pieces: list[int], sink: int, recent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, calls = fed(pieces, sink, recent), []
    monkeypatch.setattr(Window, "_in_one", lambda self, q: calls.append(q.shape) or True)
    for found, known in zip(fed(pieces, sink, recent), expected, strict=True):
        close(found, known)
    assert calls
