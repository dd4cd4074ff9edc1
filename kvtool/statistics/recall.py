"""How much attention a choice of entries finds, by what stands for them: all units and summaries on one footing.

    [ SINK first entries, always read | bulk: whole units, chosen from | RECENT newest and the rows' own, always read ]

For each row the bulk's units are ranked by what a summary says of them, as a plan that reads selectively would rank
them (`kvtool/cache/read/units.py` does it here and there): scores of a KV head's queries, softmax over units, mean. The
best are taken up to a budget, a share of the bulk, and recall is the attention that they and what is always read hold.

`mass` [L,K,choices,budgets], `always` [L,K] and `bulk` [L,K], the latter over choices of nothing and of everything:
sums over rows, means over query heads. `looked` [choices]: bytes read to rank, as a share of the bulk's keys and
values; sums over the layers and texts that `counted` counts.

Rows looked at are the last `ROWS` of each text, of its second half at most, and all choose from the same entries.
Channels and bases are the text's own, better than calibrated ones would be. Layers with a sliding window of their own
are left out. It knows neither runs, which need a tokenizer or a threshold, nor choices that are kept over steps, nor
what a lower encoding does to keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtool.cache.lane import Step
from kvtool.cache.read import tails
from kvtool.cache.read.summaries._base import Given
from kvtool.cache.read.units import Units
from kvtool.cache.segments import Dense
from kvtool.slots import Read
from kvtool.statistics._base import States, Statistic

ROWS, SINK, RECENT, GRAIN = 32, 4, 16, 64  # GRAIN: entries of the largest unit
BUDGETS = (0.02, 0.05, 0.1, 0.2)
PART = 8  # channels and dimensions: one of so many


@dataclass(frozen=True)
class Choice:
    """Units of a form and size, and the summary that ranks them; `narrow`: it looks at D / PART channels."""

    form: str
    unit: int
    summary: str
    narrow: bool = False


CHOICES = {
    "recent": Choice("recent", 1, ""),
    "token keys": Choice("page", 1, "keys"),
    "token own-channels": Choice("page", 1, "keys", narrow=True),
    "token channels": Choice("page", 1, "channels", narrow=True),
    "token low-rank": Choice("page", 1, "low-rank", narrow=True),
    "page-16 minmax": Choice("page", 16, "minmax"),
    "page-16 mean": Choice("page", 16, "mean"),
    "page-64 minmax": Choice("page", 64, "minmax"),
    "page-64 mean": Choice("page", 64, "mean"),
    "cluster-16 mean": Choice("cluster", 16, "mean"),
    "cluster-16 root-mean": Choice("cluster", 16, "root-mean"),
}


class Recall(Statistic):
    default = False

    def zero(self) -> None:
        layers, heads = self.geometry.layers, self.geometry.kv_heads
        self.add("mass", layers, heads, len(CHOICES), len(BUDGETS))
        self.add("always", layers, heads)
        self.add("bulk", layers, heads)
        self.add("looked", len(CHOICES))
        self.add("counted", 1)
        self.add("rows", 1)

    def states(self, view: States) -> None:
        tokens = view.k.shape[1]
        first = max(tokens - ROWS, tokens // 2)
        end = SINK + max(0, first - SINK - RECENT) // GRAIN * GRAIN
        if end == SINK:
            return
        if view.layer == 0:
            self["rows"] += tokens - first
        if self.geometry.windows[view.layer] is not None:
            return
        weights = attended(view, first)[..., SINK:end]
        self["bulk"][view.layer] += weights.double().sum((1, 2))
        self["always"][view.layer] += tokens - first - weights.double().sum((1, 2))
        self["counted"] += 1
        for number, choice in enumerate(CHOICES.values()):
            self._judge(view, choice, number, (first, end), weights)

    def _judge(
        self, view: States, choice: Choice, number: int, borders: tuple[int, int], weights: torch.Tensor
    ) -> None:
        """weights [K,R,S] of the bulk."""
        entries = weights.shape[2]
        if choice.form == "recent":
            for at, budget in enumerate(BUDGETS):
                newest = weights[..., entries - round(budget * entries) :]
                self["mass"][view.layer, :, number, at] += newest.double().sum((1, 2))
            return
        units, ranked, looked = rank(view, choice, *borders)
        self["looked"][number] += looked
        worth = weights.unflatten(2, (-1, units.grain)).sum(-1)
        for at, budget in enumerate(BUDGETS):
            index = units.best(ranked, max(1, round(budget * entries / units.grain)))[0]
            self["mass"][view.layer, :, number, at] += worth.gather(2, index).double().sum((1, 2))


def rank(view: States, choice: Choice, first: int, end: int) -> tuple[Units, torch.Tensor, float]:
    """The units of the entries SINK … end − 1, what the rows from `first` on rank them by, [1,K,R,N], and the bytes
    that this looks at as a share of the entries'."""
    k, v = (x[None, :, SINK:end].float() for x in (view.k, view.v))
    spec = Read(torch.ones(1), unit=choice.unit, form=choice.form, summary=choice.summary)  # type: ignore[arg-type]
    rank = max(1, k.shape[3] // PART) if choice.narrow else 0
    units, bulk = Units(spec, Given(_table(view, choice, k[0]), rank)), Dense()
    units.append(k, v)
    bulk.append(k, v)
    units.settle(bulk)
    q = view.q[:, first:].float().unflatten(0, (len(view.k), -1))  # [K,G,R,D]
    scores = units.scores(q.flatten(1, 2)[None], bulk).unflatten(2, q.shape[1:3])
    ranked = tails.capped(scores, Step(0, view.scale, view.softcap)).softmax(-1).mean(2)
    looked = units.looked_bytes(bulk, q.shape[1], whole=False) / bulk.read_bytes()
    return units, units.elements(ranked), looked


def _table(view: States, choice: Choice, k: torch.Tensor) -> torch.Tensor | None:
    """The text's own channels in order of their products, or basis of its keys k [K,S,D]."""
    if choice.summary == "channels":
        q = view.q.float().unflatten(0, (len(k), -1)).abs().mean((1, 2))
        return (q * k.abs().mean(1)).argsort(dim=-1, descending=True)
    if choice.summary == "low-rank":
        return torch.linalg.eigh(k.mT @ k).eigenvectors.flip(-1)
    return None


def attended(view: States, first: int) -> torch.Tensor:
    """Attention of the rows from `first` on, [K,R,T], mean over a group; learned sinks are left out."""
    rows = torch.arange(first, view.k.shape[1], device=view.k.device)
    later = torch.arange(view.k.shape[1], device=view.k.device) > rows[:, None]
    return view.logits(first).masked_fill(later, float("-inf")).softmax(-1).mean(1)
