"""Turns of queries and overlaps of what they look at, step by step, against the tensors themselves."""

from __future__ import annotations

import torch

from kvtool.model import Model
from kvtool.statistics.jumps import BINS, SHARE
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close, same


def test_jumps(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    seen, group, first = trace["jumps"], any_model.geometry.group, TOKENS // 2
    for index, layer in enumerate(layers):
        for head in range(any_model.geometry.kv_heads):
            count, overlap, before, last = torch.zeros(BINS), torch.zeros(BINS), set(), None
            for row in range(first, TOKENS):
                q = layer.q[head * group : (head + 1) * group, row].float()
                weights = (layer.scale * q @ layer.k[head, :first].float().T).softmax(-1).mean(0)
                chosen = set(weights.topk(round(SHARE * first)).indices.tolist())
                if last is not None:
                    cosine = float(torch.cosine_similarity(last, q, dim=-1).mean())
                    at = int((cosine + 1) / 2 * BINS)
                    count[at] += 1
                    overlap[at] += len(chosen & before) / len(chosen | before)
                before, last = chosen, q
            same(seen["count"][index, head], count.double())
            close(seen["overlap"][index, head], overlap.double(), torch.float32)
