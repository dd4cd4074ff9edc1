"""What layers look at together, against weights that were written down, and layers of which the answer is known."""

from __future__ import annotations

import pytest
import torch

from kvtool.corpus.base import Sample
from kvtool.model import Geometry, Model
from kvtool.rotary import NONE
from kvtool.statistics._base import States
from kvtool.statistics.overlap import SHARE, SINK, Overlap
from tests import models
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close, same

FIRST = TOKENS - 32


def test_against_weights_written_down(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    seen, group, count = trace["overlap"], any_model.geometry.group, round(SHARE * (FIRST - SINK))
    assert int(seen["rows"]) == TOKENS - FIRST
    whole = [index for index, layer in enumerate(layers) if layer.window is None]
    weights = {}
    for index in whole:
        part = layers[index].weights.float()[:, FIRST:, SINK:FIRST]
        part = part / part.sum(-1, keepdim=True)  # of the entries that are looked at
        weights[index] = part.unflatten(0, (-1, group)).mean(1)
    overlap = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    mass = torch.zeros_like(overlap)
    for i in whole:
        for j in (j for j in whole if j >= i):
            heads = len(weights[i])
            for head in range(heads):
                for row in range(TOKENS - FIRST):
                    mine, theirs = (set(weights[x][head, row].topk(count).indices.tolist()) for x in (i, j))
                    overlap[i, j] += len(mine & theirs) / count / heads
                    mass[i, j] += float(weights[j][head, row][list(mine)].sum()) / heads
    close(seen["overlap"], overlap, torch.float32)
    close(seen["mass"], mass, torch.float32)


@pytest.fixture
def geometry() -> Geometry:
    return models.shared("llama").geometry


def layer(number: int, q: torch.Tensor, k: torch.Tensor) -> States:
    return States(number, q, k, k, 1.0, None, None, NONE, None, Sample(torch.arange(k.shape[1]), "text"))


def test_equal_layers_look_at_the_same(geometry: Geometry) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(geometry.query_heads, 90, 8), torch.randn(geometry.kv_heads, 90, 8)
    made = Overlap(None, geometry)
    for number in range(geometry.layers):
        made.states(layer(number, q, k))
    share = made["overlap"] / made["rows"]
    same(share, torch.ones_like(share).triu())
    mass = made["mass"] / made["rows"]
    close(mass, mass[0, 0] * torch.ones_like(mass).triu())


def test_a_layer_that_looks_elsewhere(geometry: Geometry) -> None:
    """Layer 1 looks at two entries where layer 0 looks at two others; layer 2 at one of each. Sinks do not count."""
    tokens = 76  # two twentieths of 40 entries
    made = Overlap(None, geometry)
    for number, looked in enumerate(((10, 11), (20, 21), (10, 20))):
        k = torch.zeros(geometry.kv_heads, tokens, 8)
        k[:, list(looked), 0], k[:, :SINK, 0] = 100.0, 200.0
        q = torch.zeros(geometry.query_heads, tokens, 8)
        q[..., 0] = 1.0
        made.states(layer(number, q, k))
    expected = torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]).double()
    close(made["overlap"] / made["rows"], expected, torch.float32)
    close(made["mass"] / made["rows"], expected, torch.float32)


def test_a_text_that_is_too_short_says_nothing(geometry: Geometry) -> None:
    made = Overlap(None, geometry)
    q, k = torch.zeros(geometry.query_heads, 8, 8), torch.zeros(geometry.kv_heads, 8, 8)
    made.states(layer(0, q, k))
    assert not any(bool(array.any()) for array in made.state.values())
