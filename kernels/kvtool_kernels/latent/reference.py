"""The definition of `attend_latent`: keys are rebuilt from latents, rotated to where their entries stand, attended to.

    k_j = rotate(z_j · basis + offset, positions_j)
    logits[i, j] = cap(scale · q_i · k_j);   lse_i = log Σ_j exp(logits[i, j])
    out_i = Σ_j exp(logits[i, j] − lse_i) · v_j

A latent stands for the keys of n neighbouring KV heads, side by side, n = K/K'; without a basis it is these keys. The
first R of the D channels turn, R/2 being the width of the tables; for a pair of channels with cosine c and sine s

    (a, b) → (a·c − b·s, b·c + a·s),   pairs (i, i + R/2), or (2i, 2i + 1) where `interleaved`.

Values may be latents too, of so many heads each: out is then Σ w·z_v, to which the caller applies the values' basis
once. Latents and values may be coded. Every entry is visible to every query. No entry at all gives (0, −inf), the
neutral element of `merge`. All arithmetic is fp32. Queries come rotated.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend.reference import attend
from kvtool_kernels.packed import Packed
from kvtool_kernels.quantize.reference import dequantize


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
    """q [B,H,T,D], z [B,K',S,r], basis [K'|1,r,n·D], v [B,K″,S,Dv] → out [B,H,T,Dv] in q's dtype, lse [B,H,T] fp32.

    K = K'·n; K″ divides K. offset [K'|1,n·D]. positions int32 [B|1,K|1,S] are rows of the tables cos and sin, fp32
    [P,R/2] with R ≤ D even; R = 0 turns nothing. A coded z may be wider than r, where its codes fill up a byte; without
    a basis it must not be.
    """
    latents, values = (dequantize(side) if isinstance(side, Packed) else side.float() for side in (z, v))
    keys = rebuilt(latents, basis, offset, q.shape[-1])
    batch, _, _, entries, _ = keys.shape
    keys = keys.flatten(1, 2)
    heads = keys.shape[1]
    places = positions.expand(batch, heads, entries).long()
    return attend(
        q,
        rotate(keys, cos[places].float(), sin[places].float(), interleaved),
        values.repeat_interleave(heads // values.shape[1], 1),
        scale=scale,
        softcap=softcap,
    )


def rebuilt(z: torch.Tensor, basis: torch.Tensor | None, offset: torch.Tensor | None, width: int) -> torch.Tensor:
    """z fp32 [B,K',S,r] → keys before they turn [B,K',n,S,D], D = `width`."""
    keys = z if basis is None else z[..., : basis.shape[1]] @ basis.float()
    if offset is not None:
        keys = keys + offset[:, None].float()
    return keys.unflatten(-1, (-1, width)).transpose(2, 3)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [...,D], cos and sin [...,R/2] → the first R channels turned."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)
