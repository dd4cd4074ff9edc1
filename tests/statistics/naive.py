"""One eager forward pass with all written down: n×n attention, keys before and after RoPE, the residual stream.

Shares nothing with kvtool's profiler: attention is each architecture's own eager one, keys before RoPE come from hooks
on the projections (and their norms), the stream from hooks on the layers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from kvtool.model import Model

NAME = "written-down"


@dataclass
class Seen:
    """One layer: weights [H,T,T]; q [H,T,D], k, v and k_pre [K,T,D]; the stream [T,hidden]; W_O [hidden,H·D]."""

    weights: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_pre: torch.Tensor
    before: torch.Tensor
    middle: torch.Tensor
    after: torch.Tensor
    output: torch.Tensor
    scale: float
    softcap: float | None
    window: int | None

    @property
    def visible(self) -> torch.Tensor:
        """bool [T,T]: may row i see column j?"""
        tokens = self.weights.shape[-1]
        row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
        return (column <= row) & (column > row - (self.window or tokens))

    def logits(self, row: int, head: int, end: int) -> torch.Tensor:
        """Of a KV head's queries at a row with its first `end` keys, fp32 [G,end]."""
        group = len(self.q) // len(self.k)
        q, k = self.q[head * group : (head + 1) * group, row].float(), self.k[head, :end].float()
        logits = self.scale * q @ k.T
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


_calls: list[dict[str, Any]] = []


def _attention(module: Any, query, key, value, attention_mask, scaling=None, **kwargs):
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out, weights = eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    _calls.append(
        dict(weights=weights[0], q=query[0], k=key[0], v=value[0], scale=scaling, softcap=kwargs.get("softcap"),
             window=kwargs.get("sliding_window"))
    )  # fmt: skip
    return out, weights


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


def written_down(model: Model, ids: torch.Tensor) -> list[Seen]:
    """ids int64 [T] → one record per layer."""
    network = model.network
    notes: list[dict[str, torch.Tensor]] = [{} for _ in network.base_model.layers]
    hooks = []
    for layer, note in zip(network.base_model.layers, notes, strict=True):
        hooks += _hooks(layer, note)
    before = network.config._attn_implementation
    network.set_attn_implementation(NAME)
    _calls.clear()
    try:
        with torch.no_grad():
            network.base_model(input_ids=ids[None])
    finally:
        network.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    records = []
    for layer, call, note in zip(network.base_model.layers, _calls, notes, strict=True):
        attention = getattr(layer, "self_attn", None) or layer.attention
        projection = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
        kv_heads, tokens, width = call["k"].shape
        k_pre = note.pop("k_pre")
        if k_pre.dim() == 3 and hasattr(attention, "query_key_value"):  # GPT-NeoX: q, k, v of a head side by side
            k_pre = k_pre.reshape(1, tokens, kv_heads, 3 * width)[..., width : 2 * width]
        if k_pre.dim() == 3 or k_pre.shape[2] == kv_heads:
            k_pre = k_pre.reshape(1, tokens, kv_heads, width).transpose(1, 2)
        records.append(Seen(**call, **note, k_pre=k_pre[0], output=projection.weight))
    return records


def _hooks(layer: Any, note: dict[str, torch.Tensor]) -> list[Any]:
    attention = getattr(layer, "self_attn", None) or layer.attention
    keys = next(
        getattr(attention, name) for name in ("k_norm", "k_proj", "query_key_value") if hasattr(attention, name)
    )

    def keep(name: str, value: Any) -> None:
        note[name] = (value[0] if isinstance(value, tuple) else value).detach()

    hooks = [
        keys.register_forward_hook(lambda module, args, out: keep("k_pre", out)),
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: keep("before", (args[0] if args else kwargs["hidden_states"])[0]),
            with_kwargs=True,
        ),
        layer.register_forward_hook(lambda module, args, out: keep("after", out[0])),
    ]
    norms = [getattr(layer, name, None) for name in ("pre_feedforward_layernorm", "post_attention_layernorm")]
    norm = next((norm for norm in norms if norm is not None), None)
    if norm is None or type(layer).__name__ == "GPTNeoXLayer":  # attention and MLP side by side
        hook = attention.register_forward_hook(lambda module, args, out: keep("middle", note["before"] + out[0][0]))
    else:  # the second norm reads the stream after attention
        hook = norm.register_forward_pre_hook(lambda module, args: keep("middle", args[0][0]))
    return [*hooks, hook]
