"""Extreme tokens, the residual stream and attention maps against the tensors themselves."""

from __future__ import annotations

import torch

from kvtool.model import Model
from kvtool.statistics._base import SLICE, Stream
from kvtool.statistics.extremes import MASSIVE, SINK, Extremes
from kvtool.statistics.maps import CELLS
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close, same


def test_sink_mass(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    for index, layer in enumerate(layers):
        mass = layer.weights[:, 1:, 0].mean(-1)
        close(trace["extremes"]["sink"][index], mass, torch.float32)
        same(trace["extremes"]["sink_heads"][index], (mass > SINK).double())


def test_value_drain(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    width, group = any_model.geometry.head_dim, any_model.geometry.group
    for index, layer in enumerate(layers):
        for head in range(any_model.geometry.query_heads):
            written = layer.v[head // group] @ layer.output[:, head * width : (head + 1) * width].T
            norm = written.norm(dim=-1)
            close(trace["extremes"]["value_first"][index, head], norm[0], torch.float32)
            close(trace["extremes"]["value_rest"][index, head], norm[1:].mean(), torch.float32)


def test_logit_gap(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    for index, layer in enumerate(layers):
        keys = layer.k.repeat_interleave(any_model.geometry.group, 0)
        logits = layer.scale * layer.q @ keys.transpose(1, 2)
        rows = [logits[:, row, 0] - logits[:, row, 1 : row + 1].mean(-1) for row in range(1, TOKENS)]
        close(trace["extremes"]["gap"][index], torch.stack(rows).mean(0), torch.float32)


def test_residual_stream(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    streams = [layer.before for layer in layers] + [layers[-1].after]
    for index, x in enumerate(streams):
        norm = x.norm(dim=-1)
        close(trace["extremes"]["stream_first"][index], norm[0], torch.float32)
        close(trace["extremes"]["stream_rest"][index], norm[1:].max(), torch.float32)
        massive = (x.abs().amax(-1) > MASSIVE * x.abs().mean()).sum()
        assert float(trace["extremes"]["massive"][index]) == float(massive)
    assert float(trace["extremes"]["tokens"]) == TOKENS


def test_massive_tokens_in_any_slice_of_the_stream(llama: Model) -> None:
    x = torch.ones(2 * SLICE + 100, 48)
    massive = [0, SLICE - 1, SLICE, 2 * SLICE + 99]
    x[massive, 7] = -1000.0
    x[5, 7] = 90.0  # large, yet below 100 times the mean
    statistic = Extremes(llama, llama.geometry)
    statistic.stream(Stream(0, x, x))
    assert float(statistic["massive"][0]) == len(massive)
    close(statistic["stream_rest"][0], x[SLICE].norm(), torch.float32)


def test_residual(any_model: Model) -> None:
    trace, layers = text(any_model.name)

    def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).sum()

    for index, layer in enumerate(layers):
        close(trace["residual"]["attention"][index], cosine(layer.before, layer.middle), torch.float32)
        close(trace["residual"]["layer"][index], cosine(layer.before, layer.after), torch.float32)
    assert float(trace["residual"]["tokens"]) == TOKENS


def test_maps(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    cell = [position * CELLS // TOKENS for position in range(TOKENS)]
    for index, layer in enumerate(layers):
        expected = torch.zeros(any_model.geometry.query_heads, CELLS, CELLS)
        for row in range(TOKENS):
            for column in range(row + 1):
                expected[:, cell[row], cell[column]] += layer.weights[:, row, column] / cell.count(cell[row])
        close(trace["maps"]["mass"][index], expected)
    assert float(trace["maps"]["sequences"]) == 1
