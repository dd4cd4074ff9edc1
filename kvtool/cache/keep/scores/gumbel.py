"""Attention probability with seeded Gumbel noise on the logits, so that entries just below the best keep a chance.

    s_j = reduce_i softmax_j((scale · q_i · k_j + ζ_ij) / τ),   ζ ~ Gumbel(0, 1)      (Keyformer: arXiv 2403.09054)

τ is `Select.temperature` for the prompt and `Select.warming` more at every step. Noise differs by layer, KV head and
step, and is the same for every row of a batch. A draw for each i and j would cost more than attention does: there is
one table of draws, made when a plan first names this rule, which every block of queries reads from a place that is
drawn anew, its rows at even distances. So an entry meets other draws in every row, and only distant entries of
different rows may share one. [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import Noise, View, paid

SEES = "queries"
TABLE = -torch.empty(2**21).exponential_(generator=torch.Generator().manual_seed(0)).log_()


def score(view: View) -> torch.Tensor:
    return paid(view, noise)


def noise(view: View) -> Noise:
    """The noise of the view's heads, block by block."""
    draws, times = view.draws(), -(-4 * view.k.shape[2] // len(TABLE))
    table = TABLE if times == 1 else TABLE.repeat(times)

    def block(shape: torch.Size) -> torch.Tensor:
        rows, entries = shape[2:]
        start = len(table) // 2
        apart = (len(table) - start - entries) // (view.group * rows)
        each = [
            table.as_strided((view.group, rows, entries), (rows * apart, apart, 1), int(first))
            for first in (torch.randint(start, (), generator=draw) for draw in draws)
        ]
        return each[0] if len(each) == 1 else torch.cat(each)

    return block
