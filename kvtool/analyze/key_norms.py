"""How unequal the keys of a layer's KV heads are, and how key-driven grouping would deal query heads by it.

    n_k = ‖K_k‖_F: the norm of all keys of KV head k, over tokens and channels
    u = (n − min n) / (max n − min n);   heads_k = round(u_k / Σ u · H), and the sum is put right: one less for the head
    that has most, one more for the head that has least, until it is H; of equals the larger norm has more

(KDGQA: arXiv 2408.08454; the formula is of the released code, by card B17.) The head of the smallest norm always gets
no query head before the sum is put right. The paper trains on after dealing: query heads given to foreign keys without
training break a model, so no plan is made of this. Equal norms, 0/0 there, share alike here. DGQA, which deals by how
norms change between training steps, needs a training run and is not here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import Cell, Finding, cell, observed, plain, shown
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("gram",)


def find(trace: Trace) -> Finding:
    gram, tokens = observed(trace, "gram", "tokens")
    norms = (gram["k"].diagonal(dim1=-2, dim2=-1).sum(-1) / tokens).clamp_min(0).sqrt()  # [L,K], of one token
    dealt = [dealt_out(row.tolist(), trace.geometry.query_heads) for row in norms]
    spread = norms.amax(1) / norms.amin(1).clamp_min(torch.finfo(norms.dtype).tiny)
    data: dict[str, Any] = {"norm": plain(norms), "ratio": plain(spread), "query_heads": dealt}
    columns = ("layer", "least", "mean", "most", "most/least", "head", "query heads by norm")
    rows: list[tuple[Cell, ...]] = []
    for layer in shown(trace.geometry.layers):
        low, middle, high = (cell(value) for value in (norms[layer].min(), norms[layer].mean(), norms[layer].max()))
        shares = " ".join(str(count) for count in dealt[layer])
        rows.append((layer, low, middle, high, cell(spread[layer]), int(norms[layer].argmax()), shares))
    most = int(spread.argmax())
    headline = (
        f"Keys of a layer's KV heads differ by a factor of {float(spread.median()):.2f} in norm (median of layers), "
        f"most in layer {most}: {float(spread[most]):.2f}."
    )
    return Finding("key-norms", headline, columns, rows, data, {"key-norms": partial(_figure, norms)})


def dealt_out(norms: list[float], heads: int) -> list[int]:
    """Norms of a layer's KV heads → query heads of each, `heads` in sum."""
    low, high = min(norms), max(norms)
    share = [(norm - low) / (high - low) if high > low else 1.0 for norm in norms]
    counts = [round(each / sum(share) * heads) for each in share]
    while (over := sum(counts) - heads) != 0:
        order = sorted(range(len(norms)), key=lambda head: (counts[head], -norms[head]))
        counts[order[-1] if over > 0 else order[0]] -= 1 if over > 0 else -1
    return counts


def _figure(norms: torch.Tensor, figure: Figure) -> None:
    """norms [L,K]: a dot a head, and a line through their means."""
    (axis,) = draw.panels(figure, 1, 1, draw.NARROW, 2.4)
    place = torch.arange(len(norms))[:, None].expand_as(norms)
    axis.plot(place.flatten(), norms.flatten(), "o", color=draw.INKS[2], alpha=0.6, markeredgewidth=0)
    axis.plot(norms.mean(1), color=draw.INKS[0], label="mean over KV heads")
    axis.set(xlabel="layer", ylabel="root mean square norm of a key")
    axis.legend()
    draw.whole(axis)
