"""What each attention head does: retrieval, induction, echo, sink, recent, or a mixture.

Per query head, all shares from 0 to 1:

    retrieval   share of a needle's tokens that the head looked at while they were copied (arXiv 2404.15574)
    induction   attention to the token after an earlier copy of the current one, and
    echo        to the earlier copy itself, on a repeated random string (arXiv 2407.15891)
    sink        attention mass on the first 4 positions
    recent      attention mass on the nearest 64 distances
    entropy     mean over rows of H(A_i) / log(number of visible keys)

A head's class is the first whose threshold its score exceeds, in the order of `THRESHOLDS`: 0.1 is the
retrieval paper's, the others are ours. A KV head takes the best retrieval, induction and echo of its group
and the mean of the rest. Sink and recent mass overlap in the first rows, and recent mass falls with the
length of the text: a uniform head has 0.38 of it over 512 tokens, 0.14 over 2,048.

It works with whichever of its statistics the trace holds, and draws attention maps if `maps` is there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kvtool.analyze import _heads_figures as draw
from kvtool.analyze._base import NOTHING, Cell, Finding, cell, plain
from kvtool.errors import InputError
from kvtool.statistics._base import bin_edges
from kvtool.trace import Trace

STATISTICS = ("retrieval", "induction", "attention")
SINK, RECENT = 4, 64  # positions, distances; both are borders of the statistic's bins
THRESHOLDS = {"retrieval": 0.1, "induction": 0.3, "echo": 0.3, "sink": 0.5, "recent": 0.7}
CLASSES = (*THRESHOLDS, "mixed")
SCORES = (*THRESHOLDS, "entropy")
POOLED = ("retrieval", "induction", "echo")  # a KV head takes the best of its group
TOP, MAPS = 15, 6

Scores = dict[str, torch.Tensor]


def find(trace: Trace) -> Finding:
    scores, note = measure(trace)
    kv_heads, group = trace.geometry.kv_heads, trace.geometry.group
    kinds, order = classify(scores), ranking(scores)
    per_kv = {name: _grouped(values, kv_heads, name in POOLED) for name, values in scores.items()}
    data: dict[str, Any] = {
        "thresholds": THRESHOLDS,
        "counts": {name: int((kinds == index).sum()) for index, name in enumerate(CLASSES)},
        "above": {name: int((scores[name] > at).sum()) for name, at in THRESHOLDS.items() if name in scores},
        "query_heads": {**{name: plain(values) for name, values in scores.items()}, "class": _named(kinds)},
        "kv_heads": {
            **{name: plain(values) for name, values in per_kv.items()},
            "class": _named(classify(per_kv)),
        },
        "order": [list(head) for head in order],
    }
    rows = [_row(scores, kinds, head, group) for head in order[:TOP]]
    rows += [_summary(scores, kinds == index, name) for index, name in enumerate(CLASSES)]
    figures = {"heads-scores": partial(draw.scores, scores, kv_heads)}
    if "sink" in scores:
        mass = trace["attention"]["distance"] / trace["attention"]["tokens"]
        figures["heads-distance"] = partial(draw.distance, mass, kinds, CLASSES)
    if "maps" in trace.statistics and float(trace["maps"]["sequences"]):
        maps = trace["maps"]["mass"] / trace["maps"]["sequences"]
        top = {f"head {place[0]}.{place[1]}, {CLASSES[kinds[place]]}": maps[place] for place in order[:MAPS]}
        figures["heads-maps"] = partial(draw.maps, top)
    headline = _headline(scores, data["above"], order) + note
    return Finding("heads", headline, ("head", "KV", *SCORES, "class"), rows, data, figures)


def measure(trace: Trace) -> tuple[Scores, str]:
    """Scores [L,H] by name, as far as the trace has them, and a remark if no needle was found."""
    if not any(name in trace.statistics for name in STATISTICS):
        trace.need(*STATISTICS)
    scores: Scores = {}
    note = ""
    if "retrieval" in trace.statistics:
        statistic = trace["retrieval"]
        if counted := float(statistic["counted"]):
            scores["retrieval"] = statistic["score"] / counted
        else:
            note = f" No retrieval score: {int(statistic['prompts'])} needle prompts, none answered."
    if "induction" in trace.statistics and (rows := float(trace["induction"]["rows"])):
        scores |= {name: trace["induction"][name] / rows for name in ("induction", "echo")}
    if "attention" in trace.statistics and (tokens := float(trace["attention"]["tokens"])):
        statistic = trace["attention"]
        near = torch.tensor([edge < RECENT for edge in bin_edges()])
        scores["sink"] = statistic["columns"][..., :SINK].sum(-1) / tokens
        scores["recent"] = statistic["distance"][..., near].sum(-1) / tokens
        scores["entropy"] = statistic["entropy_normalised"] / tokens
    if not scores:
        raise InputError(
            "the trace's statistics of heads are empty",
            got=note.strip() or None,
            remedy="profile more samples",
        )
    return scores, note


def classify(scores: Scores) -> torch.Tensor:
    """Index into CLASSES per head: the first class whose threshold is exceeded, else "mixed"."""
    kinds = torch.full(next(iter(scores.values())).shape, len(CLASSES) - 1)
    for index, (name, threshold) in reversed(list(enumerate(THRESHOLDS.items()))):
        if name in scores:
            kinds[scores[name] > threshold] = index
    return kinds


def ranking(scores: Scores) -> list[tuple[int, int]]:
    """(layer, head) by retrieval, then induction; from attention alone, by what sink + recent would lose."""
    keys = [scores[name] for name in ("retrieval", "induction") if name in scores]
    if not keys:
        keys = [1 - scores["sink"] - scores["recent"]]
    layers, heads = keys[0].shape
    everything = [(layer, head) for layer in range(layers) for head in range(heads)]
    return sorted(everything, key=lambda head: [-float(key[head]) for key in keys])


def _grouped(values: torch.Tensor, kv_heads: int, best: bool) -> torch.Tensor:
    """[L,H] → [L,K]"""
    grouped = values.unflatten(1, (kv_heads, -1))
    return grouped.amax(-1) if best else grouped.mean(-1)


def _named(kinds: torch.Tensor) -> list[list[str]]:
    return [[CLASSES[kind] for kind in line] for line in kinds.tolist()]


def _row(scores: Scores, kinds: torch.Tensor, place: tuple[int, int], group: int) -> tuple[Cell, ...]:
    cells = [cell(scores[name][place]) if name in scores else NOTHING for name in SCORES]
    return (f"{place[0]}.{place[1]}", place[1] // group, *cells, CLASSES[kinds[place]])


def _summary(scores: Scores, chosen: torch.Tensor, name: str) -> tuple[Cell, ...]:
    """How many heads are of a class, and their mean scores."""
    cells = [cell(scores[score][chosen].mean()) if score in scores else NOTHING for score in SCORES]
    count = int(chosen.sum())
    return (f"{count} head{'s' * (count != 1)}", NOTHING, *cells, name)


def _headline(scores: Scores, above: dict[str, int], order: list[tuple[int, int]]) -> str:
    total = next(iter(scores.values())).numel()
    parts = [f"{count} {name} (> {THRESHOLDS[name]:g})" for name, count in above.items()]
    text = f"Of {total} query heads, by score: " + ", ".join(parts)
    if "retrieval" in scores or "induction" in scores:
        name = "retrieval" if "retrieval" in scores else "induction"
        text += f"; the strongest is {order[0][0]}.{order[0][1]} ({name} {float(scores[name][order[0]]):.2f})"
    return text + "."
