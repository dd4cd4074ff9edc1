"""`attend_latent` on the CPU: keys are rebuilt and turned a few at a time, in a core's cache, and never held.

Up to `FEW` query rows per KV head go through compiled loops (`_native/turning.py`). More of them, and what the loops
cannot read, go block by block:

    logits_j = scale · q · rotate(z_j · basis + offset),   block by block;   out, lse = attention of those over v

The product with the basis is nearly all the work, and PyTorch's is as quick as the processor; a group of query heads
shares it. Pairs of channels turn as complex numbers, in one pass. What is left is attention over known logits, for
which the loops of `attend_packed` need no other form: with the identity for queries, logits are keys. So values are
read as they are written.
"""

from __future__ import annotations

import torch

from kvtool_kernels._native.record import FEW, LANES, readable
from kvtool_kernels.attend_packed.cpu import attend_packed, decoded
from kvtool_kernels.latent import reference
from kvtool_kernels.packed import Packed

BLOCK = 1024  # entries whose keys are rebuilt at a time; a multiple of every group of entries


def attend_latent(
    q: torch.Tensor,
    z: Packed | torch.Tensor,
    basis: torch.Tensor | None,
    v: Packed | torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    scale: float,
    offset: torch.Tensor | None = None,
    interleaved: bool = False,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.attend_latent`."""
    given = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in (q, z, v))
    if given or not q.numel() or not _sizes(v)[1]:
        return reference.attend_latent(
            q, z, basis, v, positions, cos, sin,
            scale=scale, offset=offset, interleaved=interleaved, softcap=softcap,
        )  # fmt: skip
    if served(q, z, basis, v, offset):
        from kvtool_kernels._native import launch_turning  # only where it is asked for: Numba is slow to import

        return launch_turning.attend(
            q, z, basis, v, positions, cos, sin,
            scale=scale, offset=offset, interleaved=interleaved, softcap=softcap,
        )  # fmt: skip
    logits = _logits(q.float() * scale, z, basis, offset, positions, cos.float(), sin.float(), interleaved)
    return _weighed(q, logits, v, softcap)


def served(
    q: torch.Tensor,
    z: Packed | torch.Tensor,
    basis: torch.Tensor | None,
    v: Packed | torch.Tensor,
    offset: torch.Tensor | None,
) -> bool:
    """Whether the compiled loops can attend: few queries, sides that they can read, and keys in whole vectors."""
    width = q.shape[3]
    latents, _, held = _sizes(z)
    heads = latents * ((held if basis is None else basis.shape[2]) // width)
    plain = basis is not None or (offset is None and width % LANES == 0)
    return plain and q.shape[1] // heads * q.shape[2] <= FEW and readable(z) and readable(v)


def _logits(
    q: torch.Tensor,
    z: Packed | torch.Tensor,
    basis: torch.Tensor | None,
    offset: torch.Tensor | None,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """fp32 [B,S,H·T], a KV head's rows side by side."""
    batch, heads, tokens, width = q.shape
    shared, entries, held = _sizes(z)
    count = (held if basis is None else basis.shape[2]) // width
    rows = heads // (shared * count) * tokens
    turned = 2 * cos.shape[1]
    asked = q.reshape(batch, shared, count, rows, width)
    asked, rest = torch.cat(_pairs(asked[..., :turned], interleaved), -1), asked[..., turned:]
    asked = asked.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # pairs side by side, as complex numbers are
    logits = torch.empty(batch, entries, shared, count, rows, dtype=torch.float32, device=q.device)
    basis = None if basis is None else basis.float()
    for low in range(0, entries, BLOCK):
        high = min(low + BLOCK, entries)
        keys = reference.rebuilt(decoded(z, low, high).float(), basis, offset, width)
        part = rest @ keys[..., turned:].mT
        if turned:
            places = positions[..., low:high]
            places = places.unflatten(1, (-1, 1 if places.shape[1] == 1 else count))
            angle = torch.complex(*(x.index_select(0, places.flatten()).view(*places.shape, -1) for x in (cos, sin)))
            numbers = torch.complex(*_pairs(keys[..., :turned], interleaved)).mul_(angle)
            part += asked @ torch.view_as_real(numbers).flatten(-2).mT
        logits[:, low:high] = part.permute(0, 4, 1, 2, 3)
    return logits.flatten(2)


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that turn, first and second of each pair."""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _sizes(side: Packed | torch.Tensor) -> tuple[int, int, int]:
    """Heads, entries, width."""
    if isinstance(side, Packed):
        return side.codes.shape[1], side.tokens, side.width
    return side.shape[1], side.shape[2], side.shape[3]


def _weighed(
    q: torch.Tensor, logits: torch.Tensor, v: Packed | torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of logits [B,S,H·T] over v: each row is a query that asks for one channel of a key."""
    batch, heads, tokens, _ = q.shape
    groups, _, _ = _sizes(v)
    rows = heads * tokens // groups
    keys = logits.unflatten(2, (groups, rows)).transpose(1, 2)
    outs, levels = [], []
    for low in range(0, rows, FEW):
        part = keys[..., low : low + FEW]
        count = part.shape[-1]
        asked = torch.eye(count, dtype=torch.float32)[None, :, None].repeat(batch, groups, 1, 1)
        out, level = attend_packed(asked, part, v, scale=1.0, softcap=softcap)
        outs.append(out.unflatten(1, (groups, count)))
        levels.append(level.unflatten(1, (groups, count)))
    out = torch.cat(outs, 2).reshape(batch, heads, tokens, -1)
    return out.to(q.dtype), torch.cat(levels, 2).reshape(batch, heads, tokens)
