"""Methods that decide which entries a query reads, and whether the full cache verifies."""

from __future__ import annotations

from tests.laws.rows._base import Row

ROWS = {
    "quest": Row(
        tiny=(dict(budget=0.3, page=4, dense=1, recent=3), dict(budget=5, page=1, dense=0, sink=2, recent=1)),
        lossless=(dict(budget=1.0, page=4), dict(recent=900)),
        ladder=tuple(dict(budget=share, page=4, dense=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "draft": Row(tiny=(), lossless=({}, dict(tokens=1)), ladder=()),
}
