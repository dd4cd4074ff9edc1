"""Attention probability with seeded Gumbel noise on the logits, so that entries just below the best keep a chance.

    s_j = reduce_i softmax_j((scale · q_i · k_j + ζ_ij) / τ),   ζ ~ Gumbel(0, 1)      (Keyformer: arXiv 2403.09054)

τ is `Select.temperature` for the prompt and `Select.warming` more at every step. Noise differs by layer, KV head and
step, and is the same for every row of a batch. A draw for each i and j would cost more than attention does: there is
one table of draws, made when a plan first names this rule, which every block of queries reads from a place that is
drawn anew, its rows at even distances. So an entry meets other draws in every row, and only distant entries of
different rows may share one. [B,H,S] fp32.
"""

from __future__ import annotations

from itertools import count

import torch

from kvtool.cache.keep.scores._base import Noise, View, paid

SEES = "queries"
ALL = 2**64 - 1
TABLE = -torch.empty(2**21, dtype=torch.float32).exponential_(generator=torch.Generator().manual_seed(0)).log_()


def score(view: View) -> torch.Tensor:
    return paid(view, noise)


def noise(view: View) -> Noise:
    """The noise of the view's heads, block by block."""
    table, number = _table(view), count()

    def block(shape: torch.Size) -> torch.Tensor:
        rows, entries = shape[2:]
        apart, now = _apart(table, view, rows), next(number)
        each = [
            table.as_strided((view.group, rows, entries), (rows * apart, apart, 1), _place(table, view, head, now))
            for head in view.heads
        ]
        return each[0] if len(each) == 1 else torch.cat(each)

    return block


def shift(view: View) -> list[torch.Tensor]:
    """The noise of a decode step's query: that of a block of one row."""
    table = _table(view)
    shape, steps = (view.group, view.k.shape[2]), (_apart(table, view, 1), 1)
    return [table.as_strided(shape, steps, _place(table, view, head, 0)) for head in view.heads]


def _table(view: View) -> torch.Tensor:
    times = -(-4 * view.k.shape[2] // len(TABLE))
    return TABLE if times == 1 else TABLE.repeat(times)


def _apart(table: torch.Tensor, view: View, rows: int) -> int:
    """The distance of rows in the table, of which each KV head has so many for each of its query heads."""
    return (len(table) // 2 - view.k.shape[2]) // (view.group * rows)


def _place(table: torch.Tensor, view: View, head: int, block: int) -> int:
    """Where in the table's first half a block begins: a hash of seed, layer, head, step and block (the finalizer of
    SplitMix64 after each), which depends neither on the batch nor on how heads share lanes."""
    place = 0
    for number in (view.spec.seed, view.layer, head, view.turn, block):
        place = (place + number + 1) * 0x9E3779B97F4A7C15 & ALL
        place = (place ^ place >> 30) * 0xBF58476D1CE4E5B9 & ALL
        place = (place ^ place >> 27) * 0x94D049BB133111EB & ALL
        place ^= place >> 31
    return place % (len(table) // 2)
