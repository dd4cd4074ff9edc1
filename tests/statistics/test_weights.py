"""Weights of tokens: column sums of attention, of mean 1; they reach the sums; traces of other weights stay apart."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from kvtool import files, trace
from kvtool.corpus.base import Sample, gather
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.profile import profile
from kvtool.statistics._weights import KINDS, check, weights
from kvtool.trace import Trace, statistic
from tests import models
from tests.models import random_ids
from tests.statistics.naive import Seen, written_down
from tests.statistics.observed import STATISTICS, TOKENS
from tests.tolerance import close, same

WEIGHED = ("channels", "cross-gram", "gram", "neighbours", "slerp")
OTHERS = [name for name in STATISTICS if statistic(name).corpus == "text" and name not in WEIGHED]


@functools.cache
def observed(name: str, kind: str, seed: int = 20) -> Trace:
    model = models.shared(name)
    made = Trace(model.fingerprint, weight=kind)
    made.statistics = {which: statistic(which)(model, model.geometry) for which in (*WEIGHED, *OTHERS)}
    sample = Sample(random_ids(1, TOKENS, seed=seed)[0], "text")
    profile(model, made, {"text": gather("text", [sample], seed=0, options={})})
    return made


@functools.cache
def layers(name: str) -> list[Seen]:
    return written_down(models.shared(name), random_ids(1, TOKENS, seed=20)[0])


def test_weights_have_mean_one_and_rsq_a_range_of_three() -> None:
    columns = torch.tensor([9.0, 1.0, 2.0, 4.0])
    close(weights("attention", columns), columns / 4)
    found = weights("rsq", columns)
    assert found is not None
    close(found.mean(), torch.tensor(1.0))
    close(found / found.min(), torch.tensor([3.0, 1.0, 1.25, 1.75]))
    assert weights("uniform", columns) is None


@pytest.mark.parametrize("kind", ["attention", "rsq"])
def test_flat_attention_weighs_all_alike(kind: str) -> None:
    same(weights(kind, torch.full((5,), 0.7)), torch.ones(5))


@pytest.mark.parametrize("kind", ["attention", "rsq"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sums_are_weighted_by_the_columns_of_attention(name: str, kind: str) -> None:
    made = observed(name, kind)
    below: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for index, layer in enumerate(layers(name)):
        columns = layer.weights.sum((0, 1))
        close(columns.sum(), torch.tensor(float(len(layer.weights) * TOKENS)))
        weight = weights(kind, columns)
        assert weight is not None
        assert int(weight.argmax()) == int(columns.argmax())
        flat = layer.k_pre.transpose(0, 1).flatten(1)
        close(made["gram"]["k_pre"][index] / TOKENS, torch.einsum("t,tc,td->cd", weight, flat, flat) / TOKENS,
              torch.float32)  # fmt: skip
        close(made["channels"]["v.sum"][index] / TOKENS, (layer.v * weight[:, None]).mean(1), torch.float32)
        for theirs, other, k in below[-1:]:  # a pair weighs the geometric mean, or as the upper layer does
            joint = torch.einsum("t,tc,td->cd", (theirs * weight).sqrt(), other, flat)
            close(made["cross-gram"]["k_pre"][0, index - 1] / TOKENS, joint / TOKENS, torch.float32)
            energy = ((k.square() + layer.k.square()) * weight[:, None]).sum((1, 2))
            close(made["slerp"]["k_energy"][index - 1] / TOKENS, energy / TOKENS, torch.float32)
        below.append((weight, flat, layer.k))
    close(made["gram"]["q"], observed(name, "uniform")["gram"]["q"])  # queries look, keys are looked at


@pytest.mark.parametrize("which", WEIGHED)
def test_constant_weights_are_none(which: str) -> None:
    """And other weights are not."""
    model, plain = models.shared("llama"), observed("llama", "uniform")[which]
    views = _training.states(model, Sample(random_ids(1, TOKENS, seed=20)[0], "text"))
    sums = []
    for weight in (torch.ones(TOKENS), torch.linspace(0.5, 1.5, TOKENS)):
        again = statistic(which)(model, model.geometry)
        for view in views:
            again.states(dataclasses.replace(view, weight=weight))
        sums.append(again)
    for key in plain.rules:
        close(sums[0][key].double(), plain[key].double(), torch.float32)
    assert any(not torch.equal(sums[1][key], plain[key]) for key in plain.rules)


def test_a_trace_remembers_its_weight(tmp_path: Path) -> None:
    path = observed("llama", "rsq").write(str(tmp_path / "trace"))
    assert trace.read(path).weight == "rsq"
    header, tensors = files.read(path, kind="trace", schema=trace.SCHEMA)
    del header["weight"]  # as traces were before there were weights
    assert trace.read(files.write(str(tmp_path / "old"), header, tensors)).weight == "uniform"


def test_traces_of_other_weights_do_not_merge() -> None:
    with pytest.raises(InputError, match="weigh tokens differently"):
        copy.deepcopy(observed("llama", "rsq")).merge(observed("llama", "uniform", seed=21))
    both = copy.deepcopy(observed("llama", "rsq"))
    both.merge(observed("llama", "rsq", seed=21))
    assert float(both["gram"]["tokens"]) == 2 * TOKENS


@pytest.mark.parametrize("which", OTHERS)
def test_what_is_not_a_sum_over_entries_does_not_change(which: str) -> None:
    first, second = (observed("llama", kind)[which] for kind in ("uniform", "rsq"))
    for key in first.rules:
        same(first[key], second[key])


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(InputError, match="uniform, attention, rsq"):
        check("flat")
    assert [check(kind) for kind in KINDS] == list(KINDS)
