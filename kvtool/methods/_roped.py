"""Mixing KV heads without leaving RoPE: one basis over heads for each pair of channels that turn together.

    z_h = k_{h,a} + i·k_{h,b} for the pair (a, b);   RoPE: z ↦ e^{iθ} z;   w_j = Σ_h conj(U_{hj}) z_h commutes with it
    U from Σ z z* over tokens (complex), or from its real part alone: then both halves share one real matrix

A component is two columns of a C × C orthogonal matrix: the real and the imaginary part of w_j. Channels that RoPE
leaves alone are mixed freely, and their components are taken two by two. The energy of components not kept is the
error. Shapes: K KV heads, D head dim, C = K·D; w/2 pairs of the D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtool.methods import _ranks
from kvtool.rotary import Rotary
from kvtool.statistics._base import States

Sides = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pairs(rotary: Rotary) -> list[tuple[int, int]]:
    """The channels of a head that turn together."""
    width = 0 if rotary.module is None else rotary.width
    if rotary.interleaved:
        return [(at, at + 1) for at in range(0, width, 2)]
    return [(at, at + width // 2) for at in range(width // 2)]


def components(gram: torch.Tensor, rotary: Rotary, kv_heads: int, *, phase: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram of keys before RoPE fp64 [C,C] → energies fp64 [C/2], and columns fp64 [C,C], two a component: for every
    pair of channels its K components from strong to weak, then those of the other channels. `phase`: U may be
    complex."""
    width, turning = len(gram) // kv_heads, pairs(rotary)
    energies, columns = [], []
    for pair in turning:
        a, b = (torch.arange(kv_heads) * width + channel for channel in pair)
        real, turned = gram[a][:, a] + gram[b][:, b], gram[b][:, a] - gram[a][:, b]
        energy, basis = torch.linalg.eigh(torch.complex(real, turned if phase else torch.zeros_like(real)))
        energy, basis = energy.flip(0).clamp_min(0.0), basis.flip(1)
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        basis = basis * (largest.conj() / largest.abs())  # a component's own phase is free
        made = gram.new_zeros(len(gram), kv_heads, 2)
        made[a, :, 0], made[b, :, 0] = basis.real, basis.imag
        made[a, :, 1], made[b, :, 1] = -basis.imag, basis.real
        energies.append(energy)
        columns.append(made.flatten(1))
    still = [channel for channel in range(width) if channel not in {c for pair in turning for c in pair}]
    if still:
        rest = (torch.arange(kv_heads)[:, None] * width + torch.tensor(still)).flatten()
        energy, basis = _ranks.principal(gram[rest][:, rest])
        made = gram.new_zeros(len(gram), len(rest))
        made[rest] = basis
        energies.append(energy.unflatten(0, (-1, 2)).sum(1))
        columns.append(made)
    return torch.cat(energies), torch.cat(columns, 1)


def leading(rotary: Rotary, kv_heads: int, count: int) -> torch.Tensor:
    """bool [count]: which of `count` components come first for their pair: those of one head's width, the rope head."""
    first = torch.zeros(count, dtype=torch.bool)
    first[: len(pairs(rotary)) * kv_heads : kv_heads] = True
    return first


@dataclass(frozen=True)
class Mixed:
    """A layer's columns of keys fp64 [C,C], the strongest component first; which are of the rope head, bool [C], and
    its share of the energy; values' basis [C,C]; shares dropped at each rank of keys and of values, [2,C+1]."""

    keys: torch.Tensor
    rope: torch.Tensor
    rope_share: float
    values: torch.Tensor
    dropped: torch.Tensor

    def kept(self, view: States, ranks: torch.Tensor) -> Sides:
        """q, k and v of a text under the plan: keys and values through so many columns, all of them with RoPE."""
        sides = []
        for x, basis, rank in zip((view.k, view.v), (self.keys, self.values), ranks.tolist(), strict=True):
            columns = basis[:, :rank].to(x.device).float()
            flat = x.float().transpose(0, 1).flatten(1) @ columns @ columns.T
            sides.append(flat.unflatten(1, x.shape[::2]).transpose(0, 1))
        return view.q.float(), sides[0], sides[1]

    def without_rope(self, view: States, latent: int | None = None) -> Sides:
        """q [H,T,C], k [K,T,C], v [K,T,D] of the converted layer: outside the rope head all stand at position 0, and
        with `latent` that part of the keys and the values are rebuilt from their `latent` principal directions."""
        kv_heads, _, width = view.k.shape
        mix = self.keys.to(view.k.device).unflatten(0, (kv_heads, width))  # [K,D,C]
        start = view.rotary.table(torch.zeros(view.k.shape[1], dtype=torch.long, device=view.k.device))
        bare = [view.rotary.rotate(view.rotary.unrotate(x, view.table), start) for x in (view.q, view.k)]
        v = view.v.double().transpose(0, 1).flatten(1)
        rest = torch.einsum("ktd,kdc->tc", bare[1].double(), mix)[:, ~self.rope]
        if latent is not None:
            rest, v = _joint(rest, v, latent)
        k = torch.cat([torch.einsum("ktd,kdc->tc", view.k.double(), mix)[:, self.rope], rest], 1)
        each = mix.repeat_interleave(len(view.q) // kv_heads, 0)  # [H,D,C]
        q = torch.cat([(view.q.double() @ each)[..., self.rope], (bare[0].double() @ each)[..., ~self.rope]], -1)
        return q.float(), k.float().expand(kv_heads, -1, -1), v.float().unflatten(1, (kv_heads, width)).transpose(0, 1)


def _joint(rest: torch.Tensor, v: torch.Tensor, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys without RoPE [T,·] and values [T,C], both rebuilt from one latent, in which they are equally long."""
    if not rest.shape[1]:
        return rest, v
    ratio = (rest.norm(dim=1).mean() / v.norm(dim=1).mean().clamp_min(1e-30)).clamp_min(1e-30)
    both = torch.cat([rest / ratio, v], 1)
    directions = _ranks.principal(both.T @ both)[1][:, :latent]
    rebuilt = both @ directions @ directions.T
    return rebuilt[:, : rest.shape[1]] * ratio, rebuilt[:, rest.shape[1] :]
