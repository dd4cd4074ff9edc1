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

from kvtool.encoding.codecs import SIDES, WithKeys
from kvtool.encoding.encoding import Encoding
from kvtool.methods import _ranks
from kvtool.rotary import Rotary
from kvtool.statistics._base import States

NOISE = 1e-10  # share of energy that rounding to fp32 may leave
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


def leading(rotary: Rotary, kv_heads: int, count: int, heads: int = 1) -> torch.Tensor:
    """bool [count]: which of `count` components come first for their pair, `heads` of each: those of so many heads'
    width, the rope head."""
    first = torch.zeros(count, dtype=torch.bool)
    for component in range(min(heads, kv_heads)):
        first[component : len(pairs(rotary)) * kv_heads : kv_heads] = True
    return first


def flat(x: torch.Tensor) -> torch.Tensor:
    """[K,T,D] → fp64 [T,C]."""
    return x.double().transpose(0, 1).flatten(1)


def still(view: States, x: torch.Tensor) -> torch.Tensor:
    """x [·,T,D] of a text, turned to position 0."""
    start = view.rotary.table(torch.zeros(x.shape[1], dtype=torch.long, device=x.device))
    return view.rotary.rotate(view.rotary.unrotate(x, view.table), start)


@dataclass(frozen=True)
class Latent:
    """One latent of keys without RoPE and of values: [k⁰·M_rest / ratio | v] → its principal directions R.

    down, up fp64 [2C,n] of [k⁰ | v], strongest first: c = [k⁰ | v]·down, [k̂⁰ | v̂] = c·upᵀ, and energies: of the n
    directions fp64 [n], and of those that rest and values have apart, [n]; n = C_rest + C.
    """

    down: torch.Tensor
    up: torch.Tensor
    energy: torch.Tensor
    apart: torch.Tensor


def latent(rest: torch.Tensor, gram: torch.Tensor, norms: torch.Tensor, balance: float) -> Latent:
    """rest fp64 [C,n−C], the columns of keys that lose RoPE; Gram of [k⁰ | v] fp64 [2C,2C]; mean norms of k⁰·rest and
    of v, [2]. With `balance` both are equally long, times it, when their directions are found, unless no more than
    rounding is left of keys."""
    width = len(rest)
    ratio, keys = norms[0] / (norms[1] * balance).clamp_min(1e-30), gram[:width, :width]
    if float((rest.T @ keys @ rest).trace()) <= NOISE * float(keys.trace()):
        ratio = torch.ones_like(ratio)
    mixed = torch.block_diag(rest / ratio, torch.eye(width, dtype=rest.dtype))
    both = mixed.T @ gram @ mixed
    energy, directions = _ranks.principal(both)
    cut = rest.shape[1]
    apart = torch.cat([torch.linalg.eigvalsh(part).clamp_min(0.0) for part in (both[:cut, :cut], both[cut:, cut:])])
    back = torch.block_diag(rest * ratio, torch.eye(width, dtype=rest.dtype))
    return Latent(mixed @ directions, back @ directions, energy, apart.sort(descending=True).values)


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
        """q, k and v of a text if keys and values go through so many columns, all of them with RoPE."""
        sides = []
        for x, basis, rank in zip((view.k, view.v), (self.keys, self.values), ranks.tolist(), strict=True):
            columns = basis[:, :rank].to(x.device)
            sides.append((flat(x) @ columns @ columns.T).float().unflatten(1, x.shape[::2]).transpose(0, 1))
        return view.q.float(), sides[0], sides[1]

    def without_rope(self, view: States, joint: Latent | None = None, rank: int = 0) -> Sides:
        """q [H,T,2D], k [K,T,2D], v [K,T,D] of the converted layer: what is outside the rope head stands at position 0,
        and with `joint` it and the values are rebuilt from the first `rank` directions."""
        kv_heads, _, width = view.k.shape
        columns = self.keys.to(view.k.device)
        rope, rest = (columns[:, chosen] for chosen in (self.rope, ~self.rope))
        bare, v = flat(still(view, view.k)), flat(view.v)
        if joint is None:
            bare = bare @ rest @ rest.T
        else:
            down, up = (each[:, :rank].to(bare) for each in (joint.down, joint.up))
            bare, v = (torch.cat([bare, v], 1) @ down @ up.T).chunk(2, 1)
        roped = flat(view.k) @ rope @ rope.T
        k = torch.cat([x.unflatten(1, (kv_heads, width)) for x in (roped, bare)], -1)
        q = torch.cat([view.q, still(view, view.q)], -1)
        return q.float(), k.float().transpose(0, 1), v.float().unflatten(1, (kv_heads, width)).transpose(0, 1)

    def pair(self, joint: Latent, rank: int, kv_heads: int) -> _ranks.Pair:
        """[k | k⁰ | v] of all heads as [the rope head | the first `rank` directions]: the key's encoding, and the
        value's. Nothing is made of a rope head that is all of the key, and of all directions."""
        if bool(self.rope.all()) and rank == len(joint.energy):
            return Encoding(), Encoding()
        rope, count = self.keys[:, self.rope], len(self.keys)
        made = []
        for columns in (joint.down, joint.up):
            wide = rope.new_zeros(SIDES * count, rope.shape[1] + rank)
            wide[:count, : rope.shape[1]] = rope
            wide[count:, rope.shape[1] :] = columns[:, :rank]
            made.append(wide.unflatten(0, (SIDES, kv_heads, -1)).transpose(0, 1).flatten(0, 2)[None])
        return _ranks.latent(made[0], made[1].transpose(1, 2), kv_heads), Encoding(WithKeys())
