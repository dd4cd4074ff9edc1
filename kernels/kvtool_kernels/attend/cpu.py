"""`attend` on the CPU: PyTorch's flash kernel, which also returns the log-sum-exp.

A single query per sequence is packed so that its whole group reads each KV head once; causal attention over a
past is split into a dense part and a square causal part, then merged, because the kernel's causal mask is aligned
at the top left. Few queries over many entries go through the compiled loops of `attend_packed`, which divide the
entries of a head among the cores; the flash kernel divides heads only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtool_kernels._native.record import AT_ONCE, served
from kvtool_kernels.attend import reference
from kvtool_kernels.merge.reference import merge

LONG = 768  # entries from which on the loops are quicker than the flash kernel
FEW = 256  # entries from which on the loops, which know the logits, are quicker than the flash kernel and a product
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.attend`; soft caps, empty segments and unequal head dims go there."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    tokens, entries = q.shape[2], k.shape[2]
    if bias is None and entries >= LONG and (tokens == 1 or not causal) and served(q, k, v):
        from kvtool_kernels._native import launch  # only where it pays: Numba is slow to import

        return launch.attend(q, k, v, scale=scale, softcap=softcap)
    if softcap is not None or entries == 0 or k.shape[-1] != v.shape[-1]:
        return reference.attend(q, k, v, scale=scale, causal=causal, bias=bias, softcap=softcap)
    if tokens == 1 and (bias is None or bias.shape[1] == 1):
        batch, heads, _, width = q.shape
        packed = q.reshape(batch, k.shape[1], heads // k.shape[1], width)
        out, lse = _masked(packed, k, v, scale, bias)
        return out.reshape(batch, heads, 1, width), lse.reshape(batch, heads, 1)
    if causal and bias is None:
        own_k, own_v = k[:, :, entries - tokens :], v[:, :, entries - tokens :]
        own = _flash(q, own_k, own_v, 0.0, True, scale=scale)
        if entries == tokens:
            return own
        past = attend(q, k[:, :, : entries - tokens], v[:, :, : entries - tokens], scale=scale)
        return merge(past, own)
    if causal and bias is not None:
        hidden = torch.ones(tokens, entries, dtype=torch.bool).triu(entries - tokens + 1)
        bias = bias.expand(bias.shape[0], bias.shape[1], tokens, entries).masked_fill(hidden, float("-inf"))
    return _masked(q, k, v, scale, bias)


def scored(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.scored`."""
    entries, rows = k.shape[2], q.shape[1] // k.shape[1] * q.shape[2]
    if entries < FEW or rows > AT_ONCE or q.dtype != torch.float32 or not served(q, k, v):
        return *attend(q, k, v, scale=scale, softcap=softcap), reference.logits(q, k, scale=scale, softcap=softcap)
    from kvtool_kernels._native import launch  # only where it pays: Numba is slow to import

    logits = q.new_empty(*q.shape[:3], entries)
    out, lse = launch.attend(q, k, v, scale=scale, softcap=softcap, logits=logits)
    return out, lse, logits if softcap is None else softcap * torch.tanh(logits / softcap)


def ragged(
    q: torch.Tensor, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.ragged`."""
    heads, width = sum([keys.shape[1] for keys in k]), q.shape[-1]
    entries = sum([keys.shape[1] * keys.shape[2] for keys in k])
    if entries >= LONG * heads // len(k) and all(
        keys.shape[2] and keys.shape[3] == values.shape[3] == width and served(q, keys, values, heads)
        for keys, values in zip(k, v, strict=True)
    ):
        from kvtool_kernels._native import launch  # only where it pays: Numba is slow to import

        return launch.attend_lanes(q, list(zip(k, v, strict=True)), scale=scale, softcap=softcap)
    return reference.by_lane(attend, q, k, v, scale=scale, softcap=softcap)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if bias is None:
        return _flash(q, k, v, 0.0, False, scale=scale)
    bias = bias.expand(q.shape[0], bias.shape[1], q.shape[2], k.shape[2])
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=bias.to(q.dtype), scale=scale)
    blind = (bias == float("-inf")).all(-1).expand(lse.shape)  # the flash kernel returns lse 0 for these rows
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))
