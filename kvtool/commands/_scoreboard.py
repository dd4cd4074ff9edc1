"""A scoreboard for people: one table of everything, recall by depth, and who failed and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtool.commands._console import table

NOTHING = "–"
SHORT = {"perplexity_ratio": "ppl ×", "agreement": "top-1", "kl": "KL"}
ASIDE = ("interval", "prompts", "depths")  # parts of a tally that are no column
COSTS = (("bytes", "bytes_ratio"), ("read", "read_ratio"), ("prefill", "prefill_ratio"), ("decode", "decode_ratio"))


def show(record: dict[str, Any]) -> None:
    """All tables, to stderr."""
    rows, asks = record["rows"], record["asks"]
    whole = next((row["all"] for row in rows if not row["error"]), None)
    if whole is not None:
        columns = [(name, metric) for name in record["tasks"] for metric in _metrics(whole, asks, name)]
        _main(record, columns)
        for name, metric in columns:
            if any("depths" in whole.get(ask, {}).get(name, {}) for ask in asks):
                _depths(record, name, metric)
    trouble = [(row["name"], row["error"]) for row in rows if row["error"]]
    if trouble:
        table("no numbers for", ("", "why"), trouble)


def _metrics(part: dict[str, Any], asks: Sequence[str], name: str) -> list[str]:
    tally: dict[str, Any] = next((part[ask][name] for ask in asks if name in part.get(ask, {})), {})
    return [metric for metric in tally if metric not in ASIDE]


def _main(record: dict[str, Any], columns: Sequence[tuple[str, str]]) -> None:
    """What it is worth, and what it costs."""
    asks, single = record["asks"], {name for name, _ in columns if sum(name == other for other, _ in columns) == 1}
    heads = [name if name in single else SHORT.get(metric, metric) for name, metric in columns]
    rows = [row for row in record["rows"] if not row["error"]]
    title = f"{record['model']} · {record['prompts']} prompts of {', '.join(map(str, record['lengths']))} tokens · "
    title += f"{record['protocol']} prefill · {record['dtype']} on {record['device']}"
    quality = [
        (row["name"], _number(row["all"]["bytes_ratio"]), *(_asked(row["all"], asks, *column) for column in columns))
        for row in rows
    ]
    table(f"{title} · question {'/'.join(asks)}", ("", "bytes", *heads), quality)
    costs = [
        (row["name"], *(_number(row["all"][key]) for _, key in COSTS), _seconds(row["calibration_seconds"]))
        for row in rows
    ]
    table("costs ÷ full cache, and seconds of calibration", ("", *(name for name, _ in COSTS), "calibrated"), costs)


def _depths(record: dict[str, Any], name: str, metric: str) -> None:
    """A column per depth."""
    asks = record["asks"]
    grid = [f"{depth:g}" for depth in record["tasks"][name]["depths"]]
    lines = [
        (row["name"], *(_asked(row["all"], asks, name, metric, depth) for depth in grid))
        for row in record["rows"]
        if not row["error"]
    ]
    table(f"{name} {metric} by depth, question {'/'.join(asks)}", ("", *grid), lines)


def _asked(part: dict[str, Any], asks: Sequence[str], name: str, metric: str, depth: str | None = None) -> str:
    """The number under each protocol that the task has."""
    found = []
    for ask in asks:
        tally = part.get(ask, {}).get(name)
        if tally is not None:
            found.append(_number((tally if depth is None else tally["depths"][depth])[metric]))
    return "/".join(found) or NOTHING


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2f}" if value >= 0.0995 or value == 0 else f"{value:.2g}"


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f} s"
