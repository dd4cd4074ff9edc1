"""Methods that decide which entries a query reads, and whether the full cache verifies."""

from __future__ import annotations

from tests.laws.rows._base import Options, Row

MARKS = tuple(chr(code) for code in range(33, 127, 4))  # of random tokens, about every fifth ends a sentence

DHSA: Options = dict(
    budget=0.3, block=4, sink=0, local=1, dense=2, window=2, apart=2, most=3, samples=4, tokens=40, steps=2, width=4,
    hidden=4,
)  # fmt: skip

ROWS = {
    "quest": Row(
        tiny=(
            dict(budget=0.3, page=4, dense=1, recent=3),
            dict(budget=5, page=1, heads="each", dense=0, sink=2, recent=1),
        ),
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
    "actqkv": Row(
        tiny=(
            dict(budget=0.3, unit=4, keys=2, asked=3, sink=1, recent=3),
            dict(
                budget=8,
                unit=2,
                keys=1,
                asked=1,
                mode="prompt",
                positions="far",
                heads="each",
                dense=1,
                sink=2,
                recent=2,
                slow=False,
            ),
        ),
        lossless=(dict(budget=1.0, unit=4, positions="far"), dict(recent=900)),
        ladder=tuple(
            dict(budget=share, unit=8, keys=1, asked=8, mode="prompt", sink=0, recent=1)
            for share in (0.05, 0.2, 0.5, 1.0)
        ),
    ),
    "rekv": Row(
        tiny=(
            dict(budget=0.3, unit=4, asked=5, sink=1, recent=3),
            dict(
                budget=6,
                blocks="documents",
                marks=MARKS,
                asked=3,
                positions="contiguous",
                heads="mean",
                dense=1,
                sink=2,
                recent=2,
                period=3,
                slow=False,
            ),
        ),
        lossless=(dict(budget=1.0, unit=4, positions="contiguous"), dict(recent=900)),
        ladder=tuple(
            dict(budget=share, unit=8, asked=8, period=4, sink=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)
        ),
    ),
    "dhsa": Row(  # decode steps read everything, so that there is no ladder of their errors
        tiny=(DHSA, dict(budget=6, mode="vertical-slash", block=4, sink=1, local=1, dense=1)),
        lossless=(dict(budget=1.0, mode="blocks"), dict(budget=900, mode="labels")),
        ladder=(),
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
    "retrieval-attention": Row(
        tiny=(
            dict(budget=0.2, queries=16, nearest=4, degree=3, ef=3, sink=1, recent=3),
            dict(budget=5, index="cluster", entries=3, scan=0.3, dense=1, sink=0, recent=1, slow=False),
            dict(budget=3, index="flat", sink=2, recent=1, evidence=False),
        ),
        lossless=(dict(budget=1.0, sink=2, recent=4), dict(recent=900, index="cluster")),
        ladder=tuple(
            dict(budget=share, nearest=2, degree=1, ef=1, wide=1, sink=0, recent=1) for share in (0.05, 0.2, 0.5, 1.0)
        ),
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
    "ape": Row(tiny=(), lossless=(dict(mode="given", temperature=1.0, scale=1.0), dict(mode="given")), ladder=()),
    "draft": Row(tiny=(), lossless=({}, dict(tokens=1)), ladder=()),
    "triforce": Row(
        tiny=(dict(budget=0.4, chunk=4), dict(budget=8, chunk=3, group="max", tail="grow", window=5)),
        lossless=(dict(budget=1.0, tail="grow"), dict(budget=900)),
        ladder=tuple(dict(budget=share, chunk=2, tail="grow") for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "rapid": Row(tiny=(), lossless=({},), ladder=()),
}
