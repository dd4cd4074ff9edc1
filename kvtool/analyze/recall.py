"""What would a query find that reads only a part of the cache? All units and summaries on one footing.

    mass    attention that a choice finds, what is always read included: mean over rows, heads and layers
    bulk    of the attention beyond that, the share that it finds
    looked  bytes read to choose, as a share of the keys and values that are chosen from; where an index looks for the
            best, more of them with a larger budget

A choice of the entries with the largest attention (`token keys`) is the most that a budget can find with one choice per
KV head; `recent` is what the newest entries find, without any choice. Budgets are shares of what is chosen from: bytes
read by a step are budget + looked. Recall is not quality: what is missed may not matter, and what is found may stand
beside errors of the layers before, which this does not see (the profile's own attention is dense).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import Finding, cell, observed, plain
from kvtool.statistics._choices import CHOICES
from kvtool.statistics.recall import BUDGETS
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("recall",)
MIDDLE = 2  # the budget that single numbers are for
BOUND, CONTROL = "token keys", "recent"


def find(trace: Trace) -> Finding:
    statistic, rows = observed(trace, "recall", "rows")
    whole = torch.tensor([window is None for window in trace.geometry.windows])
    always = (statistic["always"] / rows)[whole]  # [L,K]
    bulk = (statistic["bulk"] / rows)[whole]
    chosen = (statistic["mass"] / rows)[whole]  # [L,K,choices,budgets]
    looked = statistic["looked"] / statistic["counted"]  # [choices,budgets]
    mass = always[..., None, None] + chosen
    beyond = chosen / bulk[..., None, None]
    by_layer = mass[..., MIDDLE].mean(1)  # [L,choices]
    layers = whole.nonzero()[:, 0]
    names = list(CHOICES)
    columns = ("unit", "summary", "looked", *(f"at {budget:g}" for budget in BUDGETS),
               f"bulk {BUDGETS[MIDDLE]:g}", "worst", "layer")  # fmt: skip
    table = []
    for number, name in enumerate(names):
        unit, _, summary = name.partition(" ")
        worst = int(by_layer[:, number].argmin())
        means = [cell(value, 3) for value in mass[:, :, number].mean((0, 1))]
        found = cell(beyond[:, :, number, MIDDLE].mean(), 3)
        lowest = cell(by_layer[worst, number], 3)
        table.append((unit, summary, cell(looked[number, MIDDLE], 3), *means, found, lowest, int(layers[worst])))
    data: dict[str, Any] = {
        "budgets": list(BUDGETS), "layers": layers.tolist(), "always": plain(always), "looked": plain(looked),
        "mass": {name: plain(mass[:, :, number]) for number, name in enumerate(names)},
        "bulk": {name: plain(beyond[:, :, number]) for number, name in enumerate(names)},
    }  # fmt: skip
    figures = {
        "recall": partial(_curves, names, looked, mass.mean((0, 1))),
        "recall-layers": partial(_layers, names, by_layer),
    }
    return Finding("recall", _headline(names, always, mass.mean((0, 1)), looked), columns, table, data, figures)


def _headline(names: list[str], always: torch.Tensor, mass: torch.Tensor, looked: torch.Tensor) -> str:
    """mass, looked [choices,budgets]."""
    at, looked = mass[:, MIDDLE], looked[:, MIDDLE]
    cheap = [name for name in names if 0 < looked[names.index(name)] < 0.25]  # that read less than they could
    best = max(cheap, key=lambda name: float(at[names.index(name)]))
    share = {name: f"{float(value):.1%}" for name, value in zip(names, at, strict=True)}
    held = f"{float(always.mean()):.1%}"
    return (
        f"{BUDGETS[MIDDLE]:.0%} of the entries hold {share[BOUND]} of the attention at best, {held} "
        f"being on what is always read; {best} finds {share[best]}, the newest entries {share[CONTROL]}."
    )


def _curves(names: list[str], looked: torch.Tensor, mass: torch.Tensor, figure: Figure) -> None:
    """mass [choices,budgets] against all that is read, which is more by looked [choices,budgets]."""
    (axis,) = draw.panels(figure, 1, 1, draw.WIDE, 3.2)
    for number, name in enumerate(names):
        look = {"color": draw.INKS[number % len(draw.INKS)], "linestyle": draw.DASHES[number // len(draw.INKS)]}
        read = torch.tensor(BUDGETS) + looked[number].float()
        axis.plot(read, mass[number], label=name, marker=draw.MARKS[number % len(draw.MARKS)], **look)
    axis.set(xlabel="bytes read ÷ bytes chosen from", ylabel="attention found")
    figure.legend(loc="outside right center")


def _layers(names: list[str], mass: torch.Tensor, figure: Figure) -> None:
    """mass [L,choices]."""
    (axis,) = draw.panels(figure, 1, 1, draw.WIDE, 3.2)
    draw.heats(figure, [axis], {f"attention found, budget {BUDGETS[MIDDLE]:g}": mass.T}, "share", draw.linear())
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("layer with full attention")
    draw.whole(axis)
