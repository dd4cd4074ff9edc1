"""The definition of `attend_latent`: keys are rebuilt from latents, rotated to where their entries stand, attended to.

    k_j = rotate(z_j · basis, positions_j)
    logits[i, j] = cap(scale · q_i · k_j);   lse_i = log Σ_j exp(logits[i, j])
    out_i = Σ_j exp(logits[i, j] − lse_i) · v_j

The first R of the D channels turn, R/2 being the width of the tables; for a pair of channels with cosine c and sine s

    (a, b) → (a·c − b·s, b·c + a·s),   pairs (i, i + R/2), or (2i, 2i + 1) where `interleaved`.

Values may be latents too: out is then Σ w·z_v, to which the caller applies the values' basis once. Every entry is
visible to every query. No entry at all gives (0, −inf), the neutral element of `merge`. All arithmetic is fp32.
Queries come rotated; what made the latents (one per KV head, or one for all of a layer) is the caller's to know.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend.reference import attend


def attend_latent(
    q: torch.Tensor,
    z: torch.Tensor,
    basis: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    scale: float,
    interleaved: bool = False,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,T,D], z [B,K|1,S,r], basis [K,r,D], v [B,K|1,S,Dv] → out [B,H,T,Dv] in q's dtype, lse [B,H,T] fp32.

    positions int32 [B|1,K|1,S] are rows of the tables cos and sin, fp32 [P,R/2] with R ≤ D even; R = 0 turns nothing.
    """
    keys = z.float() @ basis.float()
    batch, heads, entries, _ = keys.shape
    places = positions.expand(batch, heads, entries).long()
    return attend(
        q,
        rotate(keys, cos[places].float(), sin[places].float(), interleaved),
        v.expand(batch, heads, *v.shape[2:]),
        scale=scale,
        softcap=softcap,
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [...,D], cos and sin [...,R/2] → the first R channels turned."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)
