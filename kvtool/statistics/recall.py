"""How much attention a choice of entries finds, by what stands for them: all units, summaries and indexes on one
footing.

    [ SINK first entries, always read | bulk: whole units, chosen from | RECENT newest and the rows' own, always read ]

For each row the bulk's units are ranked by what a summary says of them, as a plan that reads selectively would rank
them (`_choices.py`). The best are taken up to a budget, a share of the bulk, and recall is the attention that they and
what is always read hold.

`mass` [L,K,choices,budgets], `always` [L,K] and `bulk` [L,K], the latter over choices of nothing and of everything:
sums over rows, means over query heads. `looked` [choices,budgets]: bytes read to rank, as a share of the bulk's keys
and values; sums over the layers and texts that `counted` counts.

Rows looked at are the last `ROWS` of each text, of its second half at most, and all choose from the same entries.
Layers with a sliding window of their own are left out. It knows neither sentences, which need a tokenizer, nor choices
that are kept over steps, nor what a lower encoding does to keys.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic
from kvtool.statistics._choices import CHOICES, Choice, Ranking

ROWS, SINK, RECENT, GRAIN = 32, 4, 16, 64  # GRAIN: entries of the largest unit
BUDGETS = (0.02, 0.05, 0.1, 0.2)


class Recall(Statistic):
    default = False

    def zero(self) -> None:
        layers, heads = self.geometry.layers, self.geometry.kv_heads
        self.add("mass", layers, heads, len(CHOICES), len(BUDGETS))
        self.add("always", layers, heads)
        self.add("bulk", layers, heads)
        self.add("looked", len(CHOICES), len(BUDGETS))
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
        self, view: States, choice: Choice | None, number: int, borders: tuple[int, int], weights: torch.Tensor
    ) -> None:
        """weights [K,R,S] of the bulk."""
        (first, end), entries = borders, weights.shape[2]
        if choice is None:
            for at, budget in enumerate(BUDGETS):
                newest = weights[..., entries - round(budget * entries) :]
                self["mass"][view.layer, :, number, at] += newest.double().sum((1, 2))
            return
        ranking = Ranking(view, choice, first, SINK, end)
        grain = ranking.units.grain
        worth = weights.unflatten(2, (-1, grain)).sum(-1)
        for at, budget in enumerate(BUDGETS):
            index, looked = ranking.best(max(1, round(budget * entries / grain)))
            self["looked"][number, at] += looked
            self["mass"][view.layer, :, number, at] += worth.gather(2, index).double().sum((1, 2))


def attended(view: States, first: int) -> torch.Tensor:
    """Attention of the rows from `first` on, [K,R,T], mean over a group; learned sinks are left out."""
    rows = torch.arange(first, view.k.shape[1], device=view.k.device)
    later = torch.arange(view.k.shape[1], device=view.k.device) > rows[:, None]
    return view.logits(first).masked_fill(later, float("-inf")).softmax(-1).mean(1)
