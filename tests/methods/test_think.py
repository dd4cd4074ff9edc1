"""ThinK: which channels go, and that those that say nothing go first and change nothing."""

from __future__ import annotations

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Strongest
from kvtool.encoding.transforms import Gather
from kvtool.errors import InputError
from kvtool.methods import think
from kvtool.slots import Store
from tests import models
from tests.laws.methods import plan, trace
from tests.methods.coding import entries
from tests.tolerance import close, same


def stored(**settings: object) -> Store:
    store = plan("think", models.shared("llama"), settings).store
    assert store is not None
    return store


def test_a_channel_without_keys_or_queries_goes_first_and_changes_nothing() -> None:
    k, q = entries(1, 2, 40, 8), entries(1, 2, 12, 8, seed=1)
    k[:, 0, :, 2], q[:, 1, :, 5] = 0, 0
    (encoding,) = stored(pruned=1 / 8, window=12).keys
    made = encoding.fitted(k, q)
    (step,) = made.transforms
    assert isinstance(step, Gather)
    assert [sorted(set(range(8)) - set(kept)) for kept in step.index.tolist()] == [[2], [5]]
    asked, _ = made.query(q)
    close(asked @ made.encode(k)["dense"].mT, q @ k.mT)


def test_the_score_is_the_size_of_a_channels_logits() -> None:
    """A channel's logits are of rank one, so that mean q² · mean k² ranks as ‖q_c k_cᵀ‖ does."""
    k, q = entries(1, 1, 40, 8), entries(1, 1, 12, 8, seed=1)
    size = torch.stack([torch.outer(q[0, 0, :, c], k[0, 0, :, c]).norm() for c in range(8)])
    (encoding,) = stored(pruned=0.5, window=12).keys
    (step,) = encoding.fitted(k, q).transforms
    assert isinstance(step, Gather)
    same(step.index[0], size.topk(4).indices.sort().values)


def test_half_of_what_is_pruned_is_saved() -> None:
    (key,), (value,) = stored(pruned=0.5).keys, stored(pruned=0.5).values
    made = key.fitted(entries(1, 2, 40, 8), entries(1, 2, 12, 8))
    held = [sum(x.nbytes for x in side.encode(entries(1, 2, 40, 8)).values()) for side in (made, value)]
    assert held == [2 * 40 * 4 * 4, 2 * 40 * 8 * 4]


def test_calibrated_channels_are_those_of_the_texts() -> None:
    llama = models.shared("llama")
    seen = trace(llama, ("gram",))
    made = calibrate("think", {"mode": "calibrated", "pruned": 0.5}, model=models.with_tokenizer(llama), trace=seen)
    score = seen["gram"]["q"].diagonal(dim1=-2, dim2=-1) * seen["gram"]["k"].diagonal(dim1=-2, dim2=-1)
    assert made.store is not None
    for layer, encoding in enumerate(made.store.keys):
        (step,) = encoding.transforms
        assert isinstance(step, Gather)
        assert [set(kept) for kept in step.index.tolist()] == [set(s.topk(4).indices.tolist()) for s in score[layer]]
    close(made.evidence["score"], score.float())


def test_prompts_need_no_trace_and_calibration_does() -> None:
    llama = models.with_tokenizer(models.shared("llama"))
    assert calibrate("think", {}, model=llama).store is not None
    with pytest.raises(InputError, match="reads a trace"):
        calibrate("think", {"mode": "calibrated"}, model=llama)
    with pytest.raises(InputError, match="no channel is left"):
        calibrate("think", {"pruned": 1.0}, model=llama)


def test_nothing_pruned_is_nothing_stored() -> None:
    assert stored(pruned=0.0).lossless
    assert Encoding(transforms=(Strongest(5, 3),)).fits
    assert think.at(0.75) == {"pruned": 0.5}
