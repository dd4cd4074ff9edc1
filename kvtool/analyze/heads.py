"""What each attention head does: retrieval, induction, echo, sink, recent, or a mixture.

Per query head, all shares from 0 to 1:

    retrieval   share of a needle's tokens that the head looked at while they were copied (arXiv 2404.15574)
    induction   attention to the token after an earlier copy of the current one; echo: to the copy itself; on a
                repeated random string (arXiv 2407.15891)
    sink        attention mass on the first 4 positions;   recent: on the last 64 distances
    entropy     mean over rows of H(A_i) / log(number of visible keys)

A head belongs to the first class whose threshold its score exceeds, in the order of `THRESHOLDS`: 0.1 is the
retrieval paper's; the others are ours. A KV head takes the best retrieval, induction and echo of its group and
the group's mean of the rest. Sink and recent mass overlap in the first rows, and recent mass falls with the
length of the text: a uniform head has 0.38 of it over 512 tokens, 0.14 over 2,048.

Works with whichever of its statistics the trace holds, and draws attention maps if `maps` is there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import NOTHING, Cell, Finding, cell, observed, plain
from kvtool.errors import InputError
from kvtool.statistics._base import bin_edges
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    kinds = classify(scores)
    per_kv = {name: _grouped(values, kv_heads, name in POOLED) for name, values in scores.items()}
    order = ranking(scores)
    counts = {name: int((kinds == index).sum()) for index, name in enumerate(CLASSES)}
    data = {
        "thresholds": THRESHOLDS,
        "counts": counts,
        "query_heads": {name: plain(values) for name, values in scores.items()} | {"class": _named(kinds)},
        "kv_heads": {name: plain(values) for name, values in per_kv.items()}
        | {"class": _named(classify(per_kv))},
        "order": [list(head) for head in order],
    }
    rows = [_row(scores, kinds, layer, head, group) for layer, head in order[:TOP]]
    rows += [_summary(scores, kinds == index, name) for index, name in enumerate(CLASSES) if counts[name]]
    figures = {"heads-scores": partial(_scores, scores, kv_heads)}
    if "attention" in trace.statistics and "sink" in scores:
        distance, tokens = observed(trace, "attention", "tokens")
        figures["heads-distance"] = partial(_distance, distance["distance"] / tokens, kinds)
    if "maps" in trace.statistics and float(trace["maps"]["sequences"]):
        maps, sequences = observed(trace, "maps", "sequences")
        figures["heads-maps"] = partial(_maps, maps["mass"] / sequences, order[:MAPS], kinds)
    columns = ("head", "KV", *SCORES, "class")
    return Finding("heads", _headline(scores, counts, order) + note, columns, rows, data, figures)


def measure(trace: Trace) -> tuple[Scores, str]:
    """Scores [L,H] by name, as far as the trace has them, and a remark on what it lacks."""
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
        raise InputError("the trace's head statistics have seen nothing" + note.rstrip("."))
    return scores, note


def classify(scores: Scores) -> torch.Tensor:
    """Index into CLASSES per head: the first class whose threshold is exceeded, else "mixed"."""
    kinds = torch.full(next(iter(scores.values())).shape, len(CLASSES) - 1)
    for index, (name, threshold) in reversed(list(enumerate(THRESHOLDS.items()))):
        if name in scores:
            kinds[scores[name] > threshold] = index
    return kinds


def ranking(scores: Scores) -> list[tuple[int, int]]:
    """(layer, head) by retrieval, then induction; from attention alone, by what a window would lose."""
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


def _row(scores: Scores, kinds: torch.Tensor, layer: int, head: int, group: int) -> tuple[Cell, ...]:
    cells = [cell(scores[name][layer, head]) if name in scores else NOTHING for name in SCORES]
    return (f"{layer}.{head}", head // group, *cells, CLASSES[int(kinds[layer, head])])


def _summary(scores: Scores, chosen: torch.Tensor, name: str) -> tuple[Cell, ...]:
    """How many heads are of a class, and their mean scores."""
    cells = [cell(scores[score][chosen].mean()) if score in scores else NOTHING for score in SCORES]
    return (f"{int(chosen.sum())} heads", NOTHING, *cells, name)


def _headline(scores: Scores, counts: dict[str, int], order: list[tuple[int, int]]) -> str:
    total = sum(counts.values())
    parts = [f"{counts[name]} {name}" for name in CLASSES if name in scores or name == "mixed"]
    text = f"Of {total} query heads, " + ", ".join(parts)
    for name in ("retrieval", "induction"):
        if name in scores:
            layer, head = order[0]
            return text + f"; the first is {layer}.{head} with {name} {float(scores[name][layer, head]):.2f}."
    return text + "."


def _scores(scores: Scores, kv_heads: int, figure: Figure) -> None:
    names = [name for name in ("retrieval", "induction", "echo", "sink") if name in scores]
    layers, heads = scores[names[0]].shape
    axes = draw.panels(figure, 1, len(names), min(draw.WIDE, 1.2 + 1.5 * len(names)), 0.8 + 0.09 * layers, sharey=True)
    for axis, name in zip(axes, names, strict=True):
        image = draw.heat(axis, scores[name], vmin=0, vmax=1)
        draw.groups(axis, kv_heads, heads // kv_heads)
        axis.set(title=name, xlabel="query head")
        draw.whole(axis)
    axes[0].set_ylabel("layer")
    draw.bar(figure, image, axes, "score (share)")


def _distance(mass: torch.Tensor, kinds: torch.Tensor, figure: Figure) -> None:
    """mass [L,H,BINS], share of attention by distance."""
    (axis,) = draw.panels(figure, 1, 1, draw.NARROW, 2.5)
    used = int((mass.sum((0, 1)) > 0).nonzero().max()) + 1
    beyond = torch.tensor(bin_edges()[1:] + [1 << 21])[:used]
    for index, name in enumerate(CLASSES):
        if (kinds == index).any():
            share = mass[kinds == index].mean(0)[:used].cumsum(0)
            label = f"{name} ({int((kinds == index).sum())})"
            axis.plot(beyond, share, color=draw.INKS[index], linestyle=draw.DASHES[index], label=label)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="distance δ (tokens)", ylabel="attention mass nearer than δ", ylim=(0, 1.02))
    axis.legend()


def _maps(mass: torch.Tensor, heads: list[tuple[int, int]], kinds: torch.Tensor, figure: Figure) -> None:
    """mass [L,H,64,64]; each row of cells sums to 1."""
    from matplotlib.colors import LogNorm

    axes = draw.panels(figure, 2, 3, draw.WIDE, 4.6, sharex=True, sharey=True)
    for axis in axes[len(heads) :]:
        axis.set_visible(False)
    for axis, (layer, head) in zip(axes, heads, strict=False):
        picture = mass[layer, head].where(mass[layer, head] > 0, torch.nan)
        image = draw.heat(axis, picture, norm=LogNorm(1e-4, 1, clip=True), extent=(0, 1, 1, 0), aspect="equal")
        axis.set_title(f"head {layer}.{head}, {CLASSES[int(kinds[layer, head])]}")
    figure.supxlabel("key position (share of the sequence)", fontsize=8)
    figure.supylabel("query position (share of the sequence)", fontsize=8)
    draw.bar(figure, image, axes, "attention mass per cell")
