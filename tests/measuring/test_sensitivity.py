"""Errors of layers under a plan, against both caches' attention written out."""

from __future__ import annotations

import pytest
import torch

from kvtool.corpus.base import Sample
from kvtool.measuring import sensitivity
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep
from tests import models
from tests.laws.methods import ragged
from tests.models import random_ids
from tests.statistics.naive import written_down
from tests.tolerance import close

IDS = random_ids(1, 40, seed=3)[0]
SAMPLE = Sample(IDS[:36], "text", answer=IDS[36:])


def windowed(model: Model, recent: int) -> Plan:
    g = model.geometry
    return Plan("w", model.fingerprint, keep=Keep.heads(torch.zeros(g.layers, g.kv_heads), sink=1, recent=recent))


def test_against_attention_written_out() -> None:
    model, recent = models.double("llama"), 9
    got = sensitivity.errors(model, [windowed(model, recent)], [SAMPLE], lambda *_: None)[0, 0]
    for index, layer in enumerate(written_down(model, IDS)):
        each = []
        for row in range(35, 39):  # the prompt's last token and all but the last of the answer
            v = layer.v.repeat_interleave(model.geometry.group, 0)
            weights = layer.weights[:, row, : row + 1]
            seen = torch.tensor([j == 0 or j > row - recent for j in range(row + 1)])
            less = weights * seen / (weights * seen).sum(-1, keepdim=True)
            outs = [torch.einsum("hs,hsd->hd", w, v[:, : row + 1]).flatten() @ layer.output.T for w in (weights, less)]
            each.append(float((outs[0] - outs[1]).norm() / (outs[0].norm() + 1e-5)))
        close(got[index], torch.tensor(sum(each) / 4), torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_nothing_dropped_no_error(name: str) -> None:
    model = models.shared(name)
    plans = [windowed(model, 60), ragged(model)]
    found = sensitivity.errors(model, plans, [SAMPLE, SAMPLE], lambda *_: None)
    close(found[:, 0], torch.zeros(2, model.geometry.layers), torch.float32)
    assert float(found[:, 1].max()) > 0.1
    close(found[0], found[1])
    alone = sensitivity.errors(model, plans[1:], [SAMPLE], lambda *_: None)
    close(found[0, 1], alone[0, 0])
