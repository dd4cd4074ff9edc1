"""What one layer's choice holds of another's attention, row by row, against the tensors themselves."""

from __future__ import annotations

import torch

from kvtool.model import Model
from kvtool.statistics.layer_overlap import SHARE
from tests.statistics.naive import Seen
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close

FIRST = TOKENS // 2


def test_layer_overlap(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    seen, g = trace["layer-overlap"], any_model.geometry
    overlap, mass = torch.zeros(2, g.layers, g.layers, dtype=torch.float64)
    free = [layer for layer in range(g.layers) if g.windows[layer] is None]
    for row in range(FIRST, TOKENS):
        for head in range(g.kv_heads):
            looks = [_look(layer, row, head) for layer in layers]
            for j in free:
                for i in (i for i in free if i <= j):
                    mass[i, j] += float(looks[j][1][sorted(looks[i][0])].sum()) / g.kv_heads
                    overlap[i, j] += len(looks[i][0] & looks[j][0]) / len(looks[j][0]) / g.kv_heads
    close(seen["overlap"], overlap, torch.float32)
    close(seen["mass"], mass, torch.float32)
    assert int(seen["rows"]) == TOKENS - FIRST


def _look(layer: Seen, row: int, head: int) -> tuple[set[int], torch.Tensor]:
    """The entries that a KV head would choose at a row, and the weights of all, [S]."""
    logits = layer.logits(row, head, FIRST)
    best = logits.amax(0).argsort(descending=True)[: round(SHARE * FIRST)]
    return set(best.tolist()), logits.softmax(-1).mean(0)
