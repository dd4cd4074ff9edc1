"""What the loss of a text says of its keys and values: the gradient of each number, by a real backward pass.

    loss = mean over the text of −ln p(next token);   g = ∂loss / ∂x,   x keys (before RoPE, or after it) or values

g² on the diagonal is Fisher information's estimate from one text, in which expected harm of an error e is Σ g²·e² / 2.
Nothing of the model is trained: zeros are added to every layer's keys and values, and the gradient is theirs. All
states of one text are held at once. It knows no method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache

from kvtool.corpus.base import Sample
from kvtool.dense import plain
from kvtool.model import Model
from kvtool.rotary import Rotary
from kvtool.serving import Attention, Layer
from kvtool_kernels.attend import reference


@dataclass(frozen=True)
class Felt:
    """One layer and one text: keys and values [K,T,D], and the loss's gradients by them."""

    layer: int
    k: torch.Tensor
    v: torch.Tensor
    k_gradient: torch.Tensor
    v_gradient: torch.Tensor


class _Touched(Layer):
    """The model's own attention over keys and values to which zeros were added."""

    def __init__(self, rotary: Rotary, rotated: bool):
        super().__init__()
        self.rotary, self.rotated = rotary, rotated

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        table = None if self.rotated else self.rotary.table(torch.arange(k.shape[2], device=k.device), at_once=True)
        self.k, self.v = self.rotary.unrotate(k.detach(), table)[0], v.detach()[0]
        self.moved = torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)
        return _attention(q, k + self.rotary.rotate(self.moved[0], table), v + self.moved[1], call)

    def get_seq_length(self) -> int:
        return 0

    def felt(self, layer: int) -> Felt:
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.moved]
        return Felt(layer, self.k, self.v, gradients[0][0], gradients[1][0])


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
    if call.softcap is None and call.sink_logits is None and call.window is None:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale, enable_gqa=True)
    return plain(q, k, v, call, reference.attend)


def felt(model: Model, sample: Sample, *, rotated: bool = False) -> Iterator[Felt]:
    """Every layer of one text, in order; keys before RoPE, or after it (`rotated`)."""
    layers: list[Any] = [_Touched(model.rotary(layer), rotated) for layer in range(model.geometry.layers)]
    ids = sample.tokens[None].to(model.device)
    with model.served(), torch.enable_grad():
        logits = model.network(input_ids=ids, past_key_values=Cache(layers=layers)).logits[0, :-1]
        functional.cross_entropy(logits.float(), ids[0, 1:]).backward()
    for index, layer in enumerate(layers):
        yield layer.felt(index)
