"""Attention as the model means it, of whole sequences: causal, with its sliding window, soft cap and sink logits.

    out_i = Σ_j exp(l_ij) · v_j / (Σ_j exp(l_ij) + exp(s))      l: logits of what token i sees, s: the head's sink logit

A sink logit's value is 0, so that it is a factor behind any attention whose log-sum-exp is known: σ(lse − s).

Shapes: B batch, H query heads, K KV heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvtool.serving import Attention
from kvtool_kernels.bias import hiding
from kvtool_kernels.ops import attend


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention, kernel: Callable[..., Any] = attend
) -> torch.Tensor:
    """Causal attention of whole sequences q [1,H,T,D], k, v [1,K,T,D]. `kernel`: the reference where gradients must
    flow."""
    bias = None
    if call.window is not None and call.window < k.shape[2]:
        row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        hidden = (column <= row - call.window).to(q.device)
        bias = hiding(hidden)[None, None]
    out, lse = kernel(q, k, v, scale=call.scale, causal=True, bias=bias, softcap=call.softcap)
    return with_sink_logits(out, lse, call)


def with_sink_logits(out: torch.Tensor, lse: torch.Tensor, call: Attention) -> torch.Tensor:
    """out [B,H,T,D], lse [B,H,T] after the model's sink logits, if it has any, took part in the softmax."""
    if call.sink_logits is None:
        return out
    share = torch.sigmoid(lse - call.sink_logits.to(lse.dtype)[None, :, None])
    return (out * share[..., None]).to(out.dtype)
