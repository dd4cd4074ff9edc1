"""From the journal to the scoreboard: one record per entrant, overall and by prompt length, as JSON and as rows of CSV.

    bytes, read = mean over prompts of held (read a step) ÷ the full cache's    perplexity ratio = exp(mean Δ loss)
    prefill, decode = ratio of medians over prompts    quality = mean over tasks and asks of each one's share

Shares come with the number of prompts and their 95 % interval (Wilson's). Times compare sides of one run on one
machine; the rest is the same however often a run was interrupted.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kvtool.compare.journal import Scores as Known
from kvtool.compare.plans import Entrant
from kvtool.compare.prompts import Prompt, asks
from kvtool.compare.run import key
from kvtool.replay.verdict import task

Scores = dict[str, Any]
Found = list[tuple[Prompt, str, Scores]]


def record(
    entrant: Entrant, prompts: Sequence[Prompt], journal: Known, wanted: Sequence[str], error: str,
    quality: Sequence[str], depths: Mapping[str, Sequence[float]],
) -> dict[str, Any]:  # fmt: skip
    """One entrant's row. `depths`: task → its grid. A failed entrant has its error and no numbers."""
    cell = entrant.cell
    made: dict[str, Any] = {
        "name": cell.key, "line": cell.line, "kind": cell.kind, "budget": cell.budget,
        "options": dict(cell.options) if entrant.plan is None else entrant.plan.options, "plan": entrant.path or None,
        "calibration_seconds": entrant.seconds, "error": error or None, "skipped": entrant.skipped,
    }  # fmt: skip
    if error:
        return made
    found = [
        (prompt, ask, journal.scores[key(prompt, ask, entrant)]) for prompt in prompts for ask in asks(prompt, wanted)
    ]
    lengths = dict.fromkeys(prompt.sample.length for prompt in prompts)
    made["all"] = _summary(found, quality, depths)
    made["lengths"] = {
        str(length): _summary([item for item in found if item[0].sample.length == length], quality, depths)
        for length in lengths
    }
    return made


def _summary(found: Found, quality: Sequence[str], depths: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What these prompts come to: costs, and under each ask a tally per task, whole and by depth."""
    made: dict[str, Any] = _costs(found)
    for ask in dict.fromkeys(ask for _, ask, _ in found):
        tallies: dict[str, Any] = {}
        for name in dict.fromkeys(prompt.task for prompt, other, _ in found if other == ask):
            mine = [(prompt, scores) for prompt, other, scores in found if (other, prompt.task) == (ask, name)]
            tallies[name] = task(name).tally([scores["scores"] for _, scores in mine])
            if depths.get(name):
                tallies[name]["depths"] = {
                    f"{depth:g}": task(name).tally([s["scores"] for prompt, s in mine if prompt.sample.depth == depth])
                    for depth in depths[name]
                }
        made[ask] = tallies
        shares = [tally[task(name).QUALITY] for name, tally in tallies.items() if name in quality]
        made[f"quality_{ask}"] = sum(shares) / len(shares) if shares else None
    return made


def _costs(found: Found) -> dict[str, Any]:
    scores = [scores for _, _, scores in found]
    timed = [one for one in scores if "decode_seconds" in one]
    return {
        "bytes_ratio": statistics.fmean(one["bytes"] / one["bytes_full"] for one in scores),
        "read_ratio": statistics.fmean(one["read"] / one["read_full"] for one in scores),
        "prefill_ratio": statistics.median(one["prefill_seconds"] / one["prefill_seconds_full"] for one in scores),
        "decode_ratio": (
            statistics.median(one["decode_seconds"] / one["decode_seconds_full"] for one in timed) if timed else None
        ),
        "spent_seconds": sum(one["spent_seconds"] for one in scores),
        "forced_gap": max((one["forced_gap"] for one in timed), default=None),
    }


def sheet(rows: Sequence[dict[str, Any]]) -> str:
    """CSV: a row per entrant and length, and one over all lengths; a column per number."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        head = {name: row[name] for name in ("name", "line", "kind", "budget", "calibration_seconds", "error")}
        parts = {"all": row.get("all", {}), **row.get("lengths", {})}
        lines += [{**head, "length": length, **_flat(part)} for length, part in parts.items()]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"known": {"passkey": {"recall": 1.0}}} → {"known.passkey.recall": 1.0}; intervals become two columns."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found |= _flat(item, f"{prefix}{name}.")
        elif isinstance(item, list | tuple):
            found |= {f"{prefix}{name}.{end}": part for end, part in zip(("low", "high"), item, strict=True)}
        else:
            found[f"{prefix}{name}"] = item
    return found
