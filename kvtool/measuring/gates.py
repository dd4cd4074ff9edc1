"""Trainable gates, one per KV head, between full attention and a sink-plus-recent window.

    o = α · full + (1 − α) · window        per KV head, before the output projection

(DuoAttention, arXiv 2410.10819, section 2.2.)

`record` runs the unchanged model once and keeps what the gated run needs; `gated` runs the same tokens through the
mixture, differentiable in α alone; `given` reads gates that were trained before. It knows nothing of losses, data or
schedules; methods own those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers.cache_utils import Cache

from kvtool import plan
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.serving import Attention, Layer
from kvtool_kernels.bias import hiding
from kvtool_kernels.ops import attend

BLOCK = 128  # query rows per block of windowed attention


class _Recorder(Layer):
    """Full attention; keeps its output [1,H,T,D]."""

    out: torch.Tensor | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        self.out = _full(q, k, v, call)
        return self.out

    def get_seq_length(self) -> int:
        return 0


class _Gate(Layer):
    """The mixture. `full` is the recorded output, or None to take full attention over this run's own states."""

    def __init__(self, alpha: torch.Tensor, sink: int, recent: int, full: torch.Tensor | None):
        super().__init__()
        self.alpha, self.sink, self.recent, self.full = alpha, sink, recent, full

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        return mixture(q, k, v, call, self.alpha, sink=self.sink, recent=self.recent, full=self.full)

    def get_seq_length(self) -> int:
        return 0


@dataclass(frozen=True)
class Recording:
    """One sequence under the unchanged model: final-norm hidden states [T,hidden], attention outputs per layer
    [1,H,T,D]."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    attention: list[torch.Tensor]


def record(model: Model, tokens: torch.Tensor) -> Recording:
    """tokens int64 [T]. Raises InputError for attention that the gated run could not imitate."""
    layers = [_Recorder() for _ in range(model.geometry.layers)]
    with model.served(), torch.no_grad():
        hidden = _hidden(model, tokens, layers)
    return Recording(tokens, hidden, [layer.out for layer in layers if layer.out is not None])


def gated(
    model: Model, recording: Recording, alpha: torch.Tensor, *, sink: int, recent: int, own_full: bool = False
) -> torch.Tensor:
    """Final-norm hidden states [T,hidden] of the gated run; alpha fp32 [L,K] in [0, 1].

    The full term comes from the unchanged model's states, as published; with `own_full` from the gated run's own
    states (as RLKV does). Layers with a sliding window of their own are left as they are.
    """
    layers: list[Layer] = []
    for index, window in enumerate(model.geometry.windows):
        full = None if own_full or window is not None else recording.attention[index]
        layers.append(_Gate(alpha[index], sink, recent, full))
    with model.served():
        return _hidden(model, recording.tokens, layers)


def _hidden(model: Model, tokens: torch.Tensor, layers: list[Any]) -> torch.Tensor:
    ids = tokens[None].to(model.device)
    return model.network.base_model(input_ids=ids, past_key_values=Cache(layers=layers)).last_hidden_state[0]


def mixture(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Attention,
    alpha: torch.Tensor,
    *,
    sink: int,
    recent: int,
    full: torch.Tensor | None = None,
) -> torch.Tensor:
    """A whole sequence, q [1,H,T,D], k and v [1,K,T,D], through one layer's gates fp32 [K] → [1,H,T,D]. `full` is
    full attention over other states. A layer with a sliding window of its own is not gated."""
    if full is None:
        full = _full(q, k, v, call)
    if call.window is not None:
        return full
    window = windowed(q, k, v, sink=sink, recent=recent, scale=call.scale)
    each = alpha.repeat_interleave(q.shape[1] // k.shape[1])[None, :, None, None]
    return (window + each * (full - window)).to(q.dtype)


def _full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
    """Causal attention, within the layer's own sliding window if it has one."""
    if call.softcap is not None or call.sink_logits is not None:
        raise InputError("gates cannot be trained on a model with soft-capped attention or sink logits")
    if call.window is not None:
        return windowed(q, k, v, sink=0, recent=call.window, scale=call.scale)
    if torch.is_grad_enabled() and q.requires_grad:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale, enable_gqa=True)
    return attend(q, k, v, scale=call.scale, causal=True, softcap=call.softcap)[0]


def given(path: str, eligible: torch.Tensor, *, history: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [L,K] and the evidence `history` [steps] of an earlier plan, or gates alone of a tab-separated table,
    layers by KV heads."""
    if path.endswith(".tsv"):
        try:
            alpha, past = torch.from_numpy(np.loadtxt(path, ndmin=2)).float().clamp(0, 1), torch.zeros(0)
        except (OSError, ValueError) as error:
            raise InputError(
                "cannot read the gates", got=path, expected="numbers, a line per layer, tabs between KV heads"
            ) from error
    else:
        evidence = plan.read(path).evidence
        if "alpha" not in evidence:
            raise InputError("the plan has no gates", got=path, expected="one whose evidence holds 'alpha'")
        alpha, past = evidence["alpha"], evidence.get(history, torch.zeros(0))
    if alpha.shape != eligible.shape:
        raise InputError("the gates are of another model", got=tuple(alpha.shape), expected=tuple(eligible.shape))
    return alpha, past


def windowed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sink: int, recent: int, scale: float
) -> torch.Tensor:
    """Causal attention over the first `sink` and the last `recent` positions (the query's own included),
    differentiable.

    q [1,H,T,D], k and v [1,K,T,D] → [1,H,T,D]. Time and memory O(T · (sink + recent + block)), as one batch of
    blocks.
    """
    tokens, width = q.shape[2], q.shape[3]
    block = min(BLOCK, tokens)
    blocks = -(-tokens // block)
    sink, recent = min(sink, tokens), min(recent, tokens)
    tail = blocks * block - tokens

    def near(x: torch.Tensor) -> torch.Tensor:  # [1,K,T,D] → [blocks,K,recent−1+block,D]
        x = functional.pad(x[0], (0, 0, recent - 1, tail))
        return x.unfold(1, recent - 1 + block, block).permute(1, 0, 3, 2)

    queries = functional.pad(q[0], (0, 0, 0, tail)).reshape(q.shape[1], blocks, block, width).transpose(0, 1)
    keys = torch.cat([k[:, :, :sink].expand(blocks, -1, -1, -1), near(k)], dim=2)
    values = torch.cat([v[:, :, :sink].expand(blocks, -1, -1, -1), near(v)], dim=2)
    row = torch.arange(blocks * block, device=q.device).reshape(blocks, block, 1)
    first = torch.arange(blocks, device=q.device)[:, None, None] * block - (recent - 1)
    column = first + torch.arange(recent - 1 + block, device=q.device)
    visible = torch.cat(
        [
            torch.arange(sink, device=q.device).expand(blocks, 1, -1) <= row,
            (column >= sink) & (column <= row) & (column > row - recent),
        ],
        dim=-1,
    )
    bias = hiding(~visible).to(q)
    group = q.shape[1] // k.shape[1]
    out = functional.scaled_dot_product_attention(
        queries,
        keys.repeat_interleave(group, 1),
        values.repeat_interleave(group, 1),
        attn_mask=bias[:, None],
        scale=scale,
    )
    return out.transpose(0, 1).reshape(1, q.shape[1], blocks * block, width)[:, :, :tokens]
