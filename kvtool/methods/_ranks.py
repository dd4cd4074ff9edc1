"""What low-rank methods share: bases from second moments, ranks under a budget, and the encodings made of them.

    Gram = Σ x xᵀ = U diag(λ) Uᵀ;   z = x·U_r,  x̂ = z·U_rᵀ;   Σ ‖x − x̂‖² = Σ_{i>r} λ_i

The sum runs over the tokens that were profiled; no other x̂ of rank r has a smaller error there (Eckart and Young). All
of it is fp64. A latent as wide as what it stands for, in 16 bits, is not made: entries are then held as they are, which
takes the same bytes and errs nothing.

Shapes: L layers, K KV heads, D head dim; n = count·D channels of a group of `count` neighbouring heads; M sides whose
ranks are dealt together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from kvtool.dense import plain
from kvtool.encoding.codecs import Affine, Codec, Raw
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Join, Linear
from kvtool.errors import InputError
from kvtool.model import Geometry
from kvtool.serving import Attention
from kvtool.slots import RAW, Store
from kvtool.statistics._base import States
from kvtool.trace import Trace

Pair = tuple[Encoding, Encoding]
SIXTEEN = 16  # bits of a number that no codec touched


def neighbours(kv_heads: int, most: int) -> int:
    """The largest group of neighbouring heads, at most `most`, that divides K."""
    return next(count for count in range(min(most, kv_heads), 0, -1) if kv_heads % count == 0)


def grouped(gram: torch.Tensor, kv_heads: int, count: int) -> torch.Tensor:
    """[...,C,C] → its diagonal blocks of `count` neighbouring heads, fp64 [...,K/count,n,n]."""
    groups = kv_heads // count
    split = gram.double().unflatten(-1, (groups, -1)).unflatten(-3, (groups, -1))  # [...,K/count,n,K/count,n]
    return torch.stack([split[..., at, :, at, :] for at in range(groups)], -3)


def moments(trace: Trace, kv_heads: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrices of keys before RoPE and of values, a token's mean, fp64 [L,K/count,n,n] each."""
    tokens = trace["gram"]["tokens"].clamp_min(1)
    keys, values = (grouped(trace["gram"][kind] / tokens, kv_heads, count) for kind in ("k_pre", "v"))
    return keys, values


def principal(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[...,n,n] → λ fp64 [...,n], descending, and U fp64 [...,n,n], whose columns have their largest number
    positive."""
    energy, basis = torch.linalg.eigh(gram.double())
    energy, basis = energy.flip(-1).clamp_min(0.0), basis.flip(-1)
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return energy, basis * torch.where(largest < 0, -1.0, 1.0)


def left(energy: torch.Tensor) -> torch.Tensor:
    """λ [...,n] → share of the energy that is dropped at rank 0 … n, [...,n+1]; 0 where there is none."""
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    rest = share.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([rest, torch.zeros_like(rest[..., :1])], -1)


def units(ranks: float, width: int, multiple: int, sides: int) -> tuple[int, int]:
    """`ranks`, the share of `sides`·`width` to be dealt in steps of about `multiple` → (steps, how wide each one
    is)."""
    step = math.gcd(multiple, width)
    return max(sides, min(sides * width // step, round(ranks * sides * width / step))), step


def proportional(weights: torch.Tensor, steps: int, most: int) -> torch.Tensor:
    """Deal `steps` in proportion to weights fp64 [M], 1 to `most` each: int64 [M]. What is over goes to the others."""
    dealt = torch.ones(len(weights), dtype=torch.float64)
    free = torch.ones(len(weights), dtype=torch.bool)
    while bool(free.any()):  # whoever's share lies beyond its bounds takes the bound, the worse side first
        room = steps - float(dealt[~free].sum())
        share = weights.double().clamp_min(1e-300) * room / weights.double().clamp_min(1e-300)[free].sum()
        over, under = (share - most).clamp_min(0) * free, (1 - share).clamp_min(0) * free
        fixed = (over > 0) if float(over.sum()) >= float(under.sum()) else (under > 0)
        dealt = torch.where(free, share.clamp(1, most), dealt)
        if not bool(fixed.any()):
            break
        free &= ~fixed
    made = dealt.floor().long()
    for at in (made - dealt).argsort(stable=True).tolist()[: steps - int(made.sum())]:
        made[at] += int(made[at] < most)
    return made


def greedy(dropped: torch.Tensor, steps: int, step: int) -> torch.Tensor:
    """Deal `steps` of `step` ranks so that the sum of dropped shares [M,n+1] is least: int64 [M], at least one each."""
    gains = dropped[:, :-1:step] - dropped[:, step::step]  # fall along a row, so that the best first are a prefix of it
    gains[:, 0] = math.inf
    chosen = gains.flatten().argsort(descending=True, stable=True)[:steps]
    return torch.bincount(chosen // gains.shape[1], minlength=len(gains))


def mix(rank: int) -> torch.Tensor:
    """An orthogonal matrix fp64 [rank,rank] that spreads a latent's energy over its channels: the Walsh–Hadamard
    transform over the largest power of two that divides `rank`, times the cosine transform (DCT-II) over the rest."""
    odd = rank
    made = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        made = torch.kron(made, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5)
    place = torch.arange(odd, dtype=torch.float64)
    cosines = (math.pi * (place[None] + 0.5) * place[:, None] / odd).cos() * (2 / odd) ** 0.5
    cosines[0] = odd**-0.5
    return torch.kron(made, cosines)


def latent(
    down: torch.Tensor, up: torch.Tensor, count: int, *, codec: Codec | None = None, rotated: bool = True
) -> Encoding:
    """z = x·down, x̂ = z·up for groups of `count` heads: down [K/count|1,n,r], up [K/count|1,r,n]."""
    if down.shape[-1] >= down.shape[-2] and codec is None:
        return Encoding()
    steps = (Linear(down.float().contiguous(), up.float().contiguous()),)
    joined = (Join(count), *steps) if count > 1 else steps
    return Encoding(codec or Raw(), joined, rotated=rotated)


def projection(basis: torch.Tensor, rank: int, count: int, *, bits: int = SIXTEEN, rotated: bool = True) -> Encoding:
    """The first `rank` columns of basis [K/count|1,n,n] as down, transposed as up. Below 16 bits the latent is mixed,
    and written per entry and group of heads in one min–max range."""
    columns = basis[..., :rank]
    if bits < SIXTEEN:
        columns = columns @ mix(rank)
    codec = Affine(bits, rank, "channel") if bits < SIXTEEN else None
    return latent(columns, columns.transpose(-1, -2), count, codec=codec, rotated=rotated)


def projected(
    layers: Sequence[int], bases: Sequence[Sequence[torch.Tensor] | torch.Tensor], ranks: torch.Tensor, count: int, *,
    bits: int = SIXTEEN, rotated: bool = False,
) -> dict[int, Pair]:  # fmt: skip
    """Pairs for these layers: bases of keys and of values, a layer's [K/count|1,n,n] each, and ranks int64 [N,2].
    `rotated`: keys are projected after RoPE."""
    keys, values = bases
    return {
        layer: (
            projection(keys[at], int(ranks[at, 0]), count, bits=bits, rotated=rotated),
            projection(values[at], int(ranks[at, 1]), count, bits=bits),
        )
        for at, layer in enumerate(layers)
    }


def store(geometry: Geometry, pairs: Mapping[int, Pair], *, sink: int, recent: int, block: int) -> Store:
    """One pair for all heads of each of these layers; layers without one, or whose pair changes nothing, stay raw."""
    index = torch.full((geometry.layers, geometry.kv_heads), RAW, dtype=torch.int32)
    used = {layer: pair for layer, pair in pairs.items() if not (pair[0].lossless and pair[1].lossless)}
    for number, layer in enumerate(used):
        index[layer] = number
    keys, values = (tuple(pair[side] for pair in used.values()) for side in (0, 1))
    return Store(keys, values, index, sink, recent, block)


def facts(energy: Sequence[torch.Tensor], ranks: torch.Tensor, width: int) -> dict[str, float]:
    """Mean shares of ranks int64 [N,2] of a width, and of the energy [N,G,n] of keys and of values that they keep."""
    found = {}
    for side, (name, each) in enumerate(zip(("key", "value"), energy, strict=True)):
        dropped = [left(e)[..., int(rank)].mean() for e, rank in zip(each, ranks[:, side], strict=True)]
        found[f"{name}_rank"] = float(ranks[:, side].double().mean() / width)
        found[f"{name}_energy"] = 1 - float(torch.stack(dropped).mean())
    return found


def output_change(view: States, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, projection: torch.Tensor) -> float:
    """‖(o − ô) W_Oᵀ‖ / ‖o W_Oᵀ‖ over all rows of a text, o by the view's own states, ô by q [H,T,·], k [K,T,·] and
    v [K,T,D]; W_O [hidden,H·D]."""
    call = Attention(torch.nn.Identity(), view.scale, view.softcap, view.sink_logits, None, None)
    outs = []
    for states in ((view.q, view.k, view.v), (q, k, v)):
        out = plain(states[0][None], states[1][None], states[2][None], call)
        outs.append(out[0].transpose(0, 1).flatten(1).float() @ projection.float().T)
    whole, less = outs
    return float((whole - less).norm() / whole.norm().clamp_min(torch.finfo(torch.float32).tiny))


def check_bits(bits: int, multiple: int) -> None:
    """Raise InputError for widths that no codec has, or ranks that do not fill whole bytes."""
    if bits != SIXTEEN and not 1 <= bits <= 8:
        raise InputError("bad option bits", got=bits, expected="1 to 8, or 16 for latents as they are")
    if bits != SIXTEEN and multiple % 8:
        raise InputError("bad option multiple", got=multiple, expected="a multiple of 8 for latents in codes")
