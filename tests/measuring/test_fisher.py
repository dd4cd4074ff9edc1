"""Gradients by keys before RoPE and values are what nudging the model's own projections does to the loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kvtool.corpus.base import Sample
from kvtool.measuring.fisher import felt
from kvtool.model import Model
from tests import models
from tests.models import random_ids
from tests.tolerance import close

IDS = random_ids(1, 20, seed=4)
STEP = 1e-2


def loss(model: Model, module: torch.nn.Module, change: torch.Tensor) -> float:
    """The model's own loss while `module` puts out `change` more."""
    hook = module.register_forward_hook(lambda module, args, out: out + change.reshape(out.shape))
    try:
        with torch.no_grad():
            logits = model.network(input_ids=IDS).logits[0, :-1]
    finally:
        hook.remove()
    return float(functional.cross_entropy(logits.float(), IDS[0, 1:]))


def test_after_rope_the_same_loss_is_felt() -> None:
    """RoPE turns gradients as it turns keys: a key's change is felt alike on either side."""
    model = models.shared("llama")
    sample = Sample(IDS[0], "text")
    for before, after in zip(felt(model, sample), felt(model, sample, rotated=True), strict=True):
        rotary = model.rotary(before.layer)
        table = rotary.table(torch.arange(IDS.shape[1]))
        close(after.k, rotary.rotate(before.k, table))
        close(after.k_gradient, rotary.rotate(before.k_gradient, table))
        close(after.v_gradient, before.v_gradient)


@pytest.mark.parametrize("name", ["llama", "gemma3", "rope-yarn", "gpt-oss"])
@pytest.mark.parametrize("side", ["k", "v"])
def test_gradients_are_slopes_of_the_loss(side: str, name: str) -> None:
    """gemma3 has windows, yarn scales what it turns, gpt-oss has sink logits."""
    model = models.build(name)
    layers = list(felt(model, Sample(IDS[0], "text")))
    assert [layer.layer for layer in layers] == list(range(model.geometry.layers))
    for layer in layers[:2]:
        attention = model.attention_modules[layer.layer]
        norm = getattr(attention, "k_norm", None) if side == "k" else None
        module = norm if norm is not None else getattr(attention, f"{side}_proj")
        x, gradient = getattr(layer, side), getattr(layer, f"{side}_gradient")
        torch.manual_seed(1)
        change = STEP * torch.randn_like(x)
        flat = change if norm is not None else change.transpose(0, 1)  # a norm's output has the heads first
        slope = (loss(model, module, flat) - loss(model, module, -flat)) / 2
        close(torch.tensor(slope) / STEP, (gradient * change).sum() / STEP, torch.bfloat16)
        assert float(gradient.abs().max()) > 0
