"""TidalDecode: a few layers choose what to read; the layers between read what the last of them chose.

Yang et al., arXiv 2410.05076, ICLR 2025.

    layers before `dense` read everything;   the first one after them chooses, and so do later ones, `selectors` in all
    a layer that chooses reads everything, and takes the entries with the largest q · k;   chosen anew at every step
    a layer l between reads T_s, the choice of s(l), the nearest layer before it that chooses

Which layers choose. `mode=published`: the first one and a second, by the authors' sweeps layer 13 of the 32 of
Llama-3-8B, 7 of Llama-2-7B: `again`, or at the same share of the depth. `mode=calibrated`, ours: from a text's
M[i, j], the attention of layer j that layer i's choice holds, the layers S that maximise

    Σ_l M[s(l), l]  (1 for layers that choose),   by dynamic programming over the last layer that chooses

Everything is held; what falls is bytes read: a share (dense + selectors) / L at least is read whole.

Where we depart from the released code (DerrickYLJ/TidalDecode, d67a1bd; card C1): its choices are of each query head,
hence up to G times the entries; here the heads of a group agree unless `heads=each`. The token itself is always read,
as in its kernels, not in its PyTorch path. A prompt is whole however it is cut. It fixes `selectors` at two. Repairing
the cache by prefilling now and then, which the paper describes and does not use, is not here. Layers with a sliding
window of their own read it, and choose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.model import Geometry
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ("layer-overlap",)
MODEL = False
DEPTH = 13 / 32  # where the authors choose again in Llama-3-8B


@dataclass(frozen=True)
class Options:
    """budget: entries that a layer between reads, a share of all when at most 1, else a count. mode: layers that choose
    found from a text's attention (calibrated), or by depth (published). dense: first layers that read everything.
    selectors: layers that choose, with mode=calibrated. again: the second such layer, with mode=published; 0 is 13/32
    of the depth. heads: how the query heads of a KV head agree, or each reads its own. sink, recent: entries that are
    always read. page: entries that memory hands out at once, for the count of bytes."""

    budget: float = 0.1
    mode: Literal["calibrated", "published"] = "calibrated"
    dense: int = 2
    selectors: int = 2
    again: int = 0
    heads: Literal["max", "mean", "sum", "each"] = "max"
    sink: int = 0
    recent: int = 0
    page: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "selectors", "page")
        at_least(0, self, "dense", "again", "sink", "recent")
        if self.budget <= 0:
            raise InputError("bad option budget", got=self.budget, expected="more than 0")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    free = [layer for layer in range(options.dense, g.layers) if g.windows[layer] is None]
    evidence: dict[str, torch.Tensor] = {}
    if options.mode == "calibrated":
        seen = context.seen["layer-overlap"]
        rows = seen["rows"].clamp_min(1)
        evidence = {name: (seen[name] / rows).float() for name in ("overlap", "mass")}
        chosen = selectors(seen["mass"] / rows, free, options.selectors)
    else:
        chosen = published(g, free, options.again)
    budget, owner = torch.ones(g.layers), torch.arange(g.layers, dtype=torch.int32)
    for layer in free:
        if layer not in chosen:
            owner[layer] = max(other for other in chosen if other < layer)
            budget[layer] = options.budget
    read = Read(
        budget, unit=1, summary="keys", heads=options.heads, sink=options.sink, recent=options.recent, owner=owner,
        page=options.page,
    )  # fmt: skip
    return Decision(read=read, evidence=evidence, facts={"selectors": chosen})


def published(g: Geometry, free: list[int], again: int) -> list[int]:
    """The first of the layers `free`, and the first one from `again` on."""
    if again >= g.layers:
        raise InputError("bad option again", got=again, expected=f"less than the model's {g.layers} layers")
    second = [layer for layer in free if layer >= (again or round(DEPTH * g.layers))]
    return sorted({*free[:1], *second[:1]})


def selectors(mass: torch.Tensor, free: list[int], count: int) -> list[int]:
    """Of the layers `free`, `count` that choose for the others, the first among them, so that the mass [L,L] held is
    largest."""
    gain = mass[free][:, free].tolist()
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])} if free else {}  # by the last that chooses, before it
    for _ in range(min(count, len(free)) - 1):
        longer: dict[int, tuple[float, list[int]]] = {}
        for last, (held, path) in best.items():
            for new in range(last + 1, len(free)):
                total = held + 1 + sum(gain[last][last + 1 : new])
                if new not in longer or total > longer[new][0]:
                    longer[new] = (total, [*path, new])
        best = longer
    ends = [(held + 1 + sum(gain[last][last + 1 :]), path) for last, (held, path) in best.items()]
    return [free[at] for at in max(ends)[1]] if ends else []
