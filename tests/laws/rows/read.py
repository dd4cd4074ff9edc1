"""Methods that decide which entries a query reads, and whether the full cache verifies."""

from __future__ import annotations

from tests.laws.rows._base import Row

MARKS = tuple(chr(code) for code in range(33, 127, 4))  # of random tokens, about every fifth ends a sentence

ROWS = {
    "quest": Row(
        tiny=(dict(budget=0.3, page=4, dense=1, recent=3), dict(budget=5, page=1, dense=0, sink=2, recent=1)),
        lossless=(dict(budget=1.0, page=4), dict(recent=900)),
        ladder=tuple(dict(budget=share, page=4, dense=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "double-sparsity": Row(
        tiny=(
            dict(budget=0.3, channels=8, dense=1, recent=3),
            dict(budget=5, channels=3, bits=0, rank="pair", heads="each", dense=0, sink=2, recent=1),
        ),
        lossless=(dict(budget=1.0, channels=8), dict(recent=900, channels=8)),
        ladder=tuple(dict(budget=share, channels=8, dense=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "louiskv": Row(
        tiny=(
            dict(budget=0.3, unit=4, sink=1, recent=3),
            dict(budget=6, unit=2, mode="fixed", tau=0.1, period=3, dense=1, sink=0, recent=2, slow=False),
        ),
        lossless=(dict(budget=1.0, unit=4), dict(recent=900)),
        ladder=tuple(
            dict(budget=share, unit=8, rate=0.0, period=9, sink=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)
        ),
    ),
    "sentencekv": Row(
        tiny=(
            dict(budget=0.3, factor=2, marks=MARKS, sink=1, recent=3, window=3),
            dict(budget=9, factor=0, cut="keys", apart=0.2, whole=0, heads="each", sink=1, recent=2),
        ),
        lossless=(dict(budget=1.0), dict(factor=0, recent=900)),
        ladder=tuple(
            dict(budget=share, factor=0, marks=MARKS, whole=0, sink=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)
        ),
    ),
    "retroinfer": Row(
        tiny=(
            dict(budget=0.2, estimated=0.3, unit=3, sink=1, recent=3),
            dict(budget=5, estimated=0, unit=2, dense=1, sink=0, recent=1, slow=False),
        ),
        lossless=(dict(budget=1.0, unit=4), dict(recent=900)),
        ladder=tuple(dict(budget=share, estimated=0, unit=4, sink=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "shadowkv": Row(
        tiny=(
            dict(budget=0.3, rank=0.5, chunk=4, outliers=1, local=1),
            dict(budget=8, rank=6, chunk=2, outliers=0, local=1, mode="calibrated", slow=False),
        ),
        lossless=(dict(budget=1.0, rank=1.0, chunk=4, local=1), dict(local=300, mode="calibrated")),
        ladder=tuple(
            dict(budget=share, rank=1.0, mode="calibrated", chunk=4, outliers=0, local=0)
            for share in (0.05, 0.2, 0.5, 1.0)
        ),
        loss=0.5,
    ),
    "sparf": Row(
        tiny=(
            dict(budget=0.3, channels=0.5, page=4, recent=3),
            dict(budget=5, channels=3, tail="drop", heads="max", dense=1, sink=2, recent=1),
        ),
        lossless=(dict(budget=1.0), dict(recent=900)),
        ladder=tuple(dict(budget=share, channels=2, recent=1) for share in (0.02, 0.2, 0.5, 1.0)),
    ),
    "tidal": Row(
        tiny=(
            dict(budget=0.3, dense=0, selectors=1, recent=3),
            dict(budget=5, mode="published", dense=0, again=1, heads="each", sink=2, recent=1),
        ),
        lossless=(dict(budget=1.0), dict(mode="published", recent=900)),
        ladder=tuple(dict(budget=share, dense=0, selectors=1, recent=1) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "draft": Row(tiny=(), lossless=({}, dict(tokens=1)), ladder=()),
}
