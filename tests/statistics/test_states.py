"""Statistics of keys, values and queries against the tensors themselves; keys before RoPE against the projections."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvtool.model import Model
from kvtool.statistics._base import SLICE, cosines
from kvtool.statistics.channels import HALF, HIGH, LOW, histogram
from kvtool.statistics.reservoir import BLOCKS, FREE
from kvtool.statistics.reservoir import TOKENS as BLOCK
from tests.models import random_ids
from tests.statistics.naive import written_down
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close, same

KINDS = ("k_pre", "k", "v")


def bins(x: torch.Tensor) -> torch.Tensor:
    """[T] → the histogram of one channel, one value at a time."""
    counts = torch.zeros(2 * HALF, dtype=torch.int32)
    edges = [2.0**octave * (1 + quarter / 4) for octave in range(LOW, HIGH) for quarter in range(4)] + [2.0**HIGH]
    for value in x.tolist():
        level = sum(abs(value) >= edge for edge in edges)
        counts[HALF - 1 - level if str(value).startswith("-") else HALF + level] += 1
    return counts


def test_channels(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    statistic = trace["channels"]
    for index, layer in enumerate(layers):
        for kind in KINDS:
            x = getattr(layer, kind)
            close(statistic[f"{kind}.min"][index], x.amin(1), torch.float32)
            close(statistic[f"{kind}.max"][index], x.amax(1), torch.float32)
            close(statistic[f"{kind}.sum"][index] / TOKENS, x.mean(1), torch.float32)
            close(statistic[f"{kind}.absolute"][index] / TOKENS, x.abs().mean(1), torch.float32)
            close(statistic[f"{kind}.square"][index] / TOKENS, x.square().mean(1), torch.float32)
            assert bool((statistic[f"{kind}.histogram"][index].sum(-1) == TOKENS).all())
    assert float(statistic["tokens"]) == TOKENS


def test_the_histogram_of_every_channel(llama: Model) -> None:
    trace, layers = text(llama.name)
    for head in range(llama.geometry.kv_heads):
        for channel in range(llama.geometry.head_dim):
            same(trace["channels"]["v.histogram"][1, head, channel], bins(layers[1].v[head, :, channel]))


def test_the_histogram_at_its_edges() -> None:
    values = torch.tensor([0.0, -0.0, 2.0**-13, 2.0**-12, 1.0, -1.0, 1.25, 1.2499999, 255.9, 256.0, 1e30, -1e30, 1e-40])
    same(histogram(values[:, None])[0], bins(values))


def test_gram(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    group = any_model.geometry.group
    for index, layer in enumerate(layers):
        for kind in ("k_pre", "v"):
            x = getattr(layer, kind).double().transpose(0, 1).flatten(1)
            close(trace["gram"][kind][index] / TOKENS, x.T @ x / TOKENS, torch.float32)
        for head in range(any_model.geometry.kv_heads):
            k = layer.k[head].double()
            close(trace["gram"]["k"][index, head] / TOKENS, k.T @ k / TOKENS, torch.float32)
            mine = [layer.q[head * group + member].double() for member in range(group)]
            close(trace["gram"]["q"][index, head] / TOKENS, sum(q.T @ q for q in mine) / TOKENS, torch.float32)
    assert float(trace["gram"]["tokens"]) == TOKENS


def test_neighbours(any_model: Model) -> None:
    trace, layers = text(any_model.name)

    def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).sum(-1)

    for index, (lower, upper) in enumerate(itertools.pairwise(layers)):
        for kind in "kv":
            close(trace["neighbours"][kind][index], cosine(getattr(lower, kind), getattr(upper, kind)), torch.float32)


@pytest.mark.parametrize("tokens", [1, SLICE - 1, SLICE, SLICE + 1, 1000])
def test_cosines_of_sequences_longer_than_a_slice(tokens: int) -> None:
    x, y = torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(tokens)).double()
    each = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    close(cosines(x.float(), y.float()) / tokens, each.mean(-1), torch.float32)


def test_neighbours_before_and_after_rope_agree_where_both_layers_turn_alike(llama: Model) -> None:
    trace, layers = text(llama.name)
    before = torch.stack(
        [
            torch.nn.functional.cosine_similarity(lower.k_pre, upper.k_pre, dim=-1).sum(-1)
            for lower, upper in itertools.pairwise(layers)
        ]
    )
    close(trace["neighbours"]["k"], before, torch.float32)


def test_reservoir(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    statistic = trace["reservoir"]
    blocks = TOKENS // BLOCK
    assert (statistic["priority"] != FREE).tolist() == [True] * blocks + [False] * (BLOCKS - blocks)
    assert statistic["position"][:blocks].tolist() == [0]
    for index, layer in enumerate(layers):
        for kind in "qkv":
            close(statistic[kind][0, index], getattr(layer, kind)[:, :BLOCK])


def test_keys_before_rope_are_the_projections_output(any_model: Model) -> None:
    ids = random_ids(1, 40, seed=21)[0]
    layers = written_down(any_model, ids)
    for index, layer in enumerate(layers):
        rotary = any_model.rotary(index)
        table = rotary.table(torch.arange(len(ids)))
        bare = rotary.unrotate(layer.k, table)
        close(bare, layer.k_pre)
        close(rotary.rotate(bare, table), layer.k)
        moved = rotary.move(layer.k[None], torch.arange(len(ids))[None], torch.arange(7, 7 + len(ids))[None])
        close(moved[0], rotary.rotate(layer.k_pre, rotary.table(torch.arange(7, 7 + len(ids)))))
