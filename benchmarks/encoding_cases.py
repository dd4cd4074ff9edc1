"""The rows of `encodings.py`: what each table asks, and the methods and options that answer it."""

from __future__ import annotations

from typing import Any

WINDOW = {"recent": 32, "block": 32}
CASES: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = []


def case(title: str, *entries: tuple[str, dict[str, Any]]) -> None:
    CASES.append((title, list(entries)))


case(
    "Bits: kivi",
    *(("kivi", {"bits": bits, **WINDOW}) for bits in (8, 4, 3, 2)),
)
case(
    "Uneven levels, per-channel keys, keys before RoPE, outliers kept (kvquant), at 3 and 2 bits",
    *(
        ("kvquant", {"bits": bits, **more, **WINDOW})
        for bits in (3, 2)
        for more in (
            {}, {"weights": "none"}, {"levels": "even"}, {"keys": "token"}, {"rope": "after"}, {"outliers": 0.0},
            {"qnorm": 0},
        )
        if bits == 2 or "qnorm" not in more
    ),
)  # fmt: skip
case(
    "Rotation and order, ranges of a token (rotatekv)",
    *(
        ("rotatekv", {"bits": bits, **more, **WINDOW})
        for bits in (4, 3, 2)
        for more in ({}, {"order": "none"}, {"heads": 0, "order": "none"})
    ),
)
case(
    "What the codes get wrong (gear)",
    *(
        ("gear", {"bits": 2, **more, "recent": 32, "block": 64})
        for more in ({}, {"outliers": 0.0}, {"outliers": 0.0, "rank": 0}, {"mode": "calibrated"})
    ),
    ("kivi", {"bits": 2, "group": 64, "recent": 32, "block": 64}),
)
case(
    "Tables that know no data (turboquant), sketches (qjl), angles (polarquant)",
    ("turboquant", {"keys": 4, "values": 4, "skip": 0, **WINDOW}),
    ("turboquant", {"keys": 3, "values": 3, "skip": 0, **WINDOW}),
    ("turboquant", {"keys": 3, "values": 3, "skip": 2, **WINDOW}),
    ("turboquant", {"keys": 3, "values": 3, "skip": 0, "coding": "rotated", **WINDOW}),
    ("turboquant", {"keys": 2, "values": 2, "skip": 0, "coding": "rotated", **WINDOW}),
    ("turboquant", {"keys": 2, "values": 2, "skip": 0, **WINDOW}),
    ("turboquant", {"keys": 3, "values": 3, "skip": 0, "unbiased": True, **WINDOW}),
    ("turboquant", {"keys": 2.5, "values": 2.5, "skip": 0, "coding": "rotated", **WINDOW}),
    ("qjl", {"recent": 32, "block": 32}),
    ("polarquant", {"values": 16, "recent": 32}),
    ("polarquant", {"values": 4, "recent": 32}),
    ("polarquant", {"form": "nested", **WINDOW}),
)
case(
    "Precision by the kind or age of a token (zipcache, mikv, saq, vidkv)",
    ("zipcache", {"block": 32}),
    ("zipcache", {"block": 32, "mode": "calibrated"}),
    ("zipcache", {"block": 32, "high": 2, "low": 2}),
    ("mikv", {"bits": 4, "when": "prefill"}),
    ("mikv", {"bits": 2, "when": "prefill"}),
    ("mikv", {"bits": 2, "when": "prefill", "balance": False}),
    ("saq", {"bits": (8, 4, 2), "edges": (128, 256), "recent": 32, "block": 32}),
    ("saq", {"bits": (8, 4, 2), "edges": (128, 256), "recent": 32, "block": 32, "mode": "calibrated", "reach": 1000}),
    ("vidkv", WINDOW),
    ("vidkv", {"frequencies": False, **WINDOW}),
    ("vidkv", {"mode": "calibrated", **WINDOW}),
)
case(
    "Channels (think)",
    *(("think", {"pruned": share, **WINDOW}) for share in (0.2, 0.4, 0.6)),
    ("think", {"pruned": 0.4, "mode": "calibrated", **WINDOW}),
)
case(
    "Rank within a layer",
    *(("palu", {"budget": budget, **WINDOW}) for budget in (0.75, 0.5)),
    *(("palu", {"budget": 0.5, "ranks": ranks, **WINDOW}) for ranks in ("energy", "uniform")),
    ("palu", {"budget": 0.1875, "bits": 4, **WINDOW}),
    *(("eigen", {"budget": budget, **WINDOW}) for budget in (0.75, 0.5)),
    ("kv-heads", {"heads": 3, **WINDOW}),
    ("eigen", {"budget": 0.5, "sink": 4, **WINDOW}),
    ("kv-heads", {"heads": 3, "sink": 4, **WINDOW}),
    ("cskv", {"budget": 0.5, **WINDOW}),
    ("cskv", {"budget": 0.5, "start": "pca", **WINDOW}),
    ("transmla", {"budget": 0.5, **WINDOW}),
    ("transmla", {"budget": 0.5, "sink": 4, **WINDOW}),
    ("transmla", {"budget": 0.5, "form": "roped", **WINDOW}),
)
case(
    "Widths of keys and values (diffqkv)",
    *(("diffqkv", {"budget": budget, **WINDOW}) for budget in (0.75, 0.5)),
    *(("diffqkv", {"budget": 0.5, **more, **WINDOW}) for more in ({"unit": "side"}, {"unit": "head"})),
    ("diffqkv", {"budget": 0.75, "cut": "channels", **WINDOW}),
)
case(
    "Rank across layers (xkv), at equal numbers stored",
    *(
        ("xkv", {"layers": layers, "rank_k": rank, "rank_v": rank, "mode": mode, **WINDOW})
        for rank in (0.5, 0.25)
        for layers in (1, 2, 4)
        for mode in ("calibrated", "prompt")
    ),
)
case(
    "Directions of two layers (minicache)",
    ("minicache", WINDOW | {"block": 64}),
    ("minicache", {"mode": "calibrated", **WINDOW, "block": 64}),
    ("minicache", {"mode": "calibrated", "by": "cosine", **WINDOW, "block": 64}),
    ("minicache", {"mode": "calibrated", "by": "divergence", **WINDOW, "block": 64}),
    ("minicache", {"merged": 0.2, **WINDOW, "block": 64}),
    ("minicache", {"merged": 0.2, "mode": "calibrated", **WINDOW, "block": 64}),
    ("minicache", {"merged": 0.2, "mode": "calibrated", "by": "divergence", **WINDOW, "block": 64}),
)
case(
    "Codes for the disk (cachegen)",
    *(("cachegen", {"level": level}) for level in (1, 2, 3)),
    ("cachegen", {"delta": True}),
)
case(
    "Layers without attention (llm-drop)",
    *(("llm-drop", {"drop": count}) for count in (1, 2, 4)),
    *(("llm-drop", {"drop": count, "again": True}) for count in (2, 4)),
)
