"""Statistics of adjacent layers together: what one direction costs, and moments across layers."""

from __future__ import annotations

import itertools

import torch

from kvtool.encoding.codecs import Slerp
from kvtool.model import Model
from kvtool.statistics.cross_gram import REACH, joint
from kvtool.statistics.slerp import PLACES
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close, same


def test_slerp_is_what_the_codec_loses(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    statistic = trace["slerp"]
    for pair, (lower, upper) in enumerate(itertools.pairwise(layers)):
        for side in "kv":
            x, y = (getattr(layer, side).double()[None] for layer in (lower, upper))
            z = torch.cat([x, y], dim=1)
            energy = (x.square() + y.square()).sum((0, 2, 3))
            close(statistic[f"{side}_energy"][pair], energy, torch.float32)
            for place, t in enumerate(PLACES.tolist()):
                codec = Slerp(t, among=TOKENS)
                lost = (codec.decode(codec.encode(z), z.shape[-1]) - z).square().sum((0, 2, 3))
                close(statistic[side][pair, :, place] / energy, sum(lost.chunk(2)) / energy, torch.float16)
    assert float(statistic["tokens"]) == TOKENS


def test_moments_across_layers(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    cross, own = trace["cross-gram"], trace["gram"]
    for side in ("k_pre", "v"):
        flat = [getattr(layer, side).double().transpose(0, 1).flatten(1) for layer in layers]
        for count in range(1, min(len(flat), REACH + 1) + 1):
            for first in range(len(flat) - count + 1):
                z = torch.cat(flat[first : first + count], dim=1)
                close(joint(own[side], cross[side], first, count) / TOKENS, z.T @ z / TOKENS, torch.float32)
        for distance in range(1, REACH + 1):
            beyond = cross[side][distance - 1, max(0, len(flat) - distance) :]
            same(beyond, torch.zeros_like(beyond))
    assert float(cross["tokens"]) == TOKENS
