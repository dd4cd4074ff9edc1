"""How evenly windows of queries look at blocks: known answers, and the statistic against loops over the tensors."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.corpus.base import Sample, gather
from kvtool.model import Model
from kvtool.statistics.block_entropy import ASKED, KEYS, REACH, UNIT, evenness
from tests import models
from tests.models import random_ids
from tests.statistics.observed import TOKENS, text
from tests.statistics.observed import trace as profiled
from tests.tolerance import close

K, G, D = 2, 3, 8


def test_equal_blocks_are_looked_at_evenly() -> None:
    draw = torch.Generator().manual_seed(0)
    probe, block = torch.randn(K, G, D, generator=draw), torch.randn(K, 1, D, generator=draw)
    close(torch.tensor(evenness(probe, block.expand(-1, 7, -1))), torch.tensor(1.0))


def test_one_block_that_is_looked_at() -> None:
    """Cosines 1 and 0, 0, 0: E = ln Z − e / Z over ln 4, with Z = e + 3."""
    blocks = torch.eye(D)[:4].expand(K, -1, -1)
    probe = 5 * torch.eye(D)[0].expand(K, G, D)
    total = math.e + 3
    close(torch.tensor(evenness(probe, blocks)), torch.tensor((math.log(total) - math.e / total) / math.log(4)))


def test_a_text(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    seen, g, reach = trace["block-entropy"], any_model.geometry, min(REACH, TOKENS // 4)
    ends = [end for end in range(TOKENS, TOKENS // 2, -ASKED) if (end - reach) // UNIT > 1]
    assert ends
    assert float(seen["windows"]) == len(ends)
    for index, layer in enumerate(layers):
        if layer.window is not None:  # it is left out
            assert float(seen["entropy"][index]) == 0
            continue
        rotary = any_model.rotary(index)
        q = rotary.unrotate(layer.q, rotary.table(torch.arange(TOKENS))).float()
        credit = [[0.0] * TOKENS for _ in range(g.kv_heads)]
        for head in range(g.kv_heads):
            for row in range(TOKENS):
                first = max(0, row - reach + 1)
                shares = layer.logits(row, head, row + 1)[:, first:].softmax(-1).sum(0)
                for at, share in enumerate(shares.tolist()):
                    credit[head][first + at] += share
        total = 0.0
        for end in ends:
            total += _entropy(q[:, :end], layer.k_pre.float(), credit, (end - reach) // UNIT, g.group)
        close(seen["entropy"][index].float(), torch.tensor(total))


def _entropy(q: torch.Tensor, k: torch.Tensor, credit: list[list[float]], blocks: int, group: int) -> float:
    """q [H,T,D] and k [K,T',D] before RoPE."""
    flat = q.transpose(0, 1).flatten(1)
    mean, variance = flat.mean(0), flat.var(0, unbiased=False)
    phi = [float(((x - mean) ** 2 / (variance + variance.mean() / 100)).mean()) for x in flat[-ASKED:]]
    probe = sum(x * (p / sum(phi)) for x, p in zip(flat[-ASKED:], phi, strict=True))
    cosines = []
    for block in range(blocks):
        vector = []
        for head in range(len(k)):
            members = range(block * UNIT, (block + 1) * UNIT)
            top = sorted(members, key=lambda at, head=head: -credit[head][at])[:KEYS]
            vector += [k[head, top].mean(0)] * group
        cosines.append(torch.cosine_similarity(torch.cat(vector), probe, dim=0))
    share = torch.stack(cosines).double().softmax(0)
    return float(-(share * share.log()).sum()) / math.log(blocks)


@pytest.mark.parametrize("tokens", [1, 12])
def test_texts_without_two_blocks_count_nothing(tokens: int) -> None:
    sample = Sample(random_ids(1, tokens)[0], "text")
    made = profiled(models.shared("llama"), {"text": gather("text", [sample], seed=0, options={})}, ["block-entropy"])
    assert float(made["block-entropy"]["windows"]) == 0
