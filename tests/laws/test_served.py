"""Nothing remains on a model after it was served, probed, profiled or gated."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from kvtool import registry
from kvtool.cache.segment_cache import SegmentCache
from kvtool.errors import InputError
from kvtool.measuring import gates
from tests import models
from tests.laws.methods import ROWS, plan, ragged, trace
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import same


def state(network: nn.Module) -> dict[str, Any]:
    """Everything that hangs on a network but its tensors' values."""
    found: dict[str, Any] = {
        "implementation": network.config._attn_implementation,
        "config": network.config.to_json_string(),
    }
    for name, module in network.named_modules():
        found[f"{name}: attributes"] = sorted(vars(module))
        found[f"{name}: forward"] = vars(module).get("forward"), type(module).forward
        found[f"{name}: hooks"] = [
            len(getattr(module, kind))
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
        ]
    for name, parameter in network.named_parameters():
        found[name] = parameter.data_ptr(), parameter._version, parameter.requires_grad, parameter.grad, vars(parameter)
    return found


@pytest.mark.parametrize("name", [*models.ARCHITECTURES, "gpt-oss"])
def test_nothing_remains(name: str) -> None:
    model = models.build(name)
    before, ids = state(model.network), random_ids(1, 20)
    expected = own(model, ids)
    feed(model, SegmentCache(model, ragged(model)), ids, [10, *[1] * 10])
    _ = model.fingerprint
    trace(model, tuple(registry.names("statistics")))
    alpha = torch.ones(model.geometry.layers, model.geometry.kv_heads)
    with pytest.raises(InputError) if name == "gpt-oss" else nullcontext():
        gates.gated(model, gates.record(model, ids[0]), alpha, sink=1, recent=4)
    assert state(model.network) == before
    same(own(model, ids), expected)


@pytest.mark.parametrize("name", ROWS)
def test_calibration_leaves_the_model_alone(name: str) -> None:
    model = models.build("llama")
    before = state(model.network)
    plan(name, model, (ROWS[name].tiny or ROWS[name].lossless)[0])
    assert state(model.network) == before


def test_an_error_inside_the_block_undoes_it_too() -> None:
    model = models.build("llama")
    before = state(model.network)
    with pytest.raises(KeyError), model.served():
        raise KeyError
    assert state(model.network) == before


def test_the_attention_without_a_cache_says_what_to_do() -> None:
    model = models.build("llama")
    with model.served(), pytest.raises(InputError, match="past_key_values"):
        model.network(input_ids=random_ids(1, 4))
