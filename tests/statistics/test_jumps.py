"""Turns of queries and overlaps of what they look at, step by step, against the tensors themselves."""

from __future__ import annotations

import pytest
import torch

from kvtool.corpus.base import Sample, gather
from kvtool.model import Model
from kvtool.statistics.jumps import BINS, SHARE
from tests import models
from tests.models import random_ids
from tests.statistics.observed import TOKENS, text
from tests.statistics.observed import trace as profiled
from tests.tolerance import close, same


def test_jumps(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    seen, group, first = trace["jumps"], any_model.geometry.group, TOKENS // 2
    for index, layer in enumerate(layers):
        for head in range(any_model.geometry.kv_heads):
            count, overlap, before, last = torch.zeros(BINS), torch.zeros(BINS), set(), None
            for row in range(first, TOKENS):
                q = layer.q[head * group : (head + 1) * group, row].float()
                weights = layer.logits(row, head, first).softmax(-1).mean(0)
                chosen = set(weights.topk(round(SHARE * first)).indices.tolist())
                if last is not None:
                    cosine = float(torch.cosine_similarity(last, q, dim=-1).mean())
                    at = int((cosine + 1) / 2 * BINS)
                    count[at] += 1
                    overlap[at] += len(chosen & before) / len(chosen | before)
                before, last = chosen, q
            if layer.window is not None:  # it is left out
                count, overlap = torch.zeros(2, BINS)
            same(seen["count"][index, head], count.double())
            close(seen["overlap"][index, head], overlap.double(), torch.float32)


@pytest.mark.parametrize("tokens", [1, 2])
def test_texts_without_a_step_count_nothing(tokens: int) -> None:
    sample = Sample(random_ids(1, tokens)[0], "text")
    made = profiled(models.shared("llama"), {"text": gather("text", [sample], seed=0, options={})}, ["jumps"])
    assert not bool(made["jumps"]["count"].any())
