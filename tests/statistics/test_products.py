"""Parts of products by channel, against the tensors themselves, and what RoPE leaves alone."""

from __future__ import annotations

import torch

from kvtool.model import Model
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close


def test_products(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    seen, group = trace["products"], any_model.geometry.group
    for index, layer in enumerate(layers):
        for head in range(any_model.geometry.kv_heads):
            k, q = layer.k[head].double(), layer.q[head * group : (head + 1) * group].double()
            expected = torch.stack([(each * k).abs().sum(0) for each in q]).sum(0)
            close(seen["qk"][index, head] / TOKENS, expected / TOKENS, torch.float32)
            close(seen["k"][index, head] / TOKENS, layer.k_pre[head].double().abs().mean(0), torch.float32)
            assert bool((seen["pair"][index, head] >= expected * (1 - 1e-5)).all())
    assert float(seen["tokens"]) == TOKENS


def test_the_length_of_a_pair_is_the_same_before_and_after_rope(llama: Model) -> None:
    rotary, x = llama.rotary(1), torch.randn(2, 40, llama.geometry.head_dim)
    turned = rotary.rotate(x, rotary.table(torch.arange(3, 43)))
    close(rotary.magnitude(turned), rotary.magnitude(x))
    assert float((turned.abs() - x.abs()).abs().max()) > 0.1
