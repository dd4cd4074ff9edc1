"""xKV: adjacent layers share one low-rank basis across all of their channels, keys before RoPE.

Chang et al., arXiv 2503.18893.

    groups of n adjacent layers;   Z = [X₁/s₁ | … | Xₙ/sₙ] per token, s_l: root mean square of layer l
    Z ≈ Z V Vᵀ, V: the ρ leading eigenvectors of Σ zᵀz;   stored: a = z·V, ρ numbers a token for n layers

    memory: 16·ρ/(n·C) bits a number, C = K·D;   the bases, 2·n·C·ρ numbers a group in fp32, are the plan's; in
    mode=prompt they are held by each sequence

The authors take the SVD of each prompt's own entries, without the scales s, which mode=prompt with normalise=false
does; their release reconstructs entries at once, stores nothing, and leaves the tokens decoded later as they are. Here
every entry that leaves the raw window is encoded, those of later tokens in the prompt's basis; mode=calibrated, which
is ours, takes bases from texts; and a layer whose entries are large does not take the whole rank (normalise, ours too).
A token's entries wait in the raw window until the last layer of the group has written its own. Layers with a sliding
window of their own stay raw, and the rest of a run that n does not divide forms a smaller group. Ranks as in the
release for Llama-3.1-8B: 512 and 768 of 4096. The first entries, which much attention meets and no basis of all tokens
fits, stay raw, which is ours too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Principal
from kvtool.encoding.transforms import Join, Linear, Transform
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share
from kvtool.methods._spans import moments, spans
from kvtool.options import at_least
from kvtool.slots import RAW, Store
from kvtool.statistics.cross_gram import REACH

STATISTICS = ("gram", "cross-gram")
MODEL = False


@dataclass(frozen=True)
class Options:
    """mode: prompt, where each prompt makes its bases, or calibrated, where texts have made them. layers: adjacent
    layers that share a basis, 1 to 4 if calibrated. rank_k, rank_v: numbers stored, as a share of those there
    are. normalise: let no layer outweigh the others of its group. recent: newest entries that stay raw. block: entries
    that leave the raw window together. sink: first entries that stay raw."""

    mode: Literal["prompt", "calibrated"] = "calibrated"
    layers: int = 4
    rank_k: float = 0.125
    rank_v: float = 0.1875
    normalise: bool = True
    recent: int = 32
    block: int = 32
    sink: int = 4

    def __post_init__(self) -> None:
        at_least(0, self, "recent", "sink")
        at_least(1, self, "block")
        if self.layers < 1 or (self.layers > REACH + 1 and self.mode == "calibrated"):
            raise InputError("bad option layers", got=self.layers, expected=f"1 to {REACH + 1}")
        for name in ("rank_k", "rank_v"):
            if not share(getattr(self, name), name):
                raise InputError(f"bad option {name}", got=0, expected="more than 0")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """Values get half as much again as keys, as published."""
    keys = min(0.8 * budget, 1.0)
    return {"rank_k": max(keys, 2 * budget - 1), "rank_v": min(1.0, 1.2 * budget)}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    index = torch.full((g.layers, g.kv_heads), RAW, dtype=torch.int32)
    first = torch.arange(g.layers, dtype=torch.int32)
    pairs: list[list[Encoding]] = []
    kept = torch.ones(2, g.layers)
    for span in spans(g, options.layers):
        index[span], first[span] = len(pairs), span[0]
        pair = []
        for row, (side, rank) in enumerate((("k_pre", options.rank_k), ("v", options.rank_v))):
            step: Transform
            if options.mode == "calibrated":
                step, kept[row, span] = basis(moments(context, side, span), len(span), rank, options.normalise)
            else:
                count = max(1, round(rank * len(span) * g.kv_heads * g.head_dim))
                step = Principal(count, len(span) if options.normalise else 1)
            pair.append(Encoding(transforms=(Join(len(span) * g.kv_heads), step), rotated=side == "v"))
        pairs.append(pair)
    keys, values = zip(*pairs, strict=True) if pairs else ((), ())
    store = Store(tuple(keys), tuple(values), index, options.sink, options.recent, options.block, first)
    return Decision(store=store, evidence={"kept": kept} if options.mode == "calibrated" else {})


def basis(moments: torch.Tensor, layers: int, rank: float, normalise: bool) -> tuple[Linear, float]:
    """moments [n·C,n·C] of n layers → the leading directions, and the share of the (normalised) energy they keep."""
    width = len(moments)
    size = moments.diagonal().unflatten(0, (layers, -1)).mean(1).sqrt() if normalise else torch.ones(layers)
    size = torch.where(size == 0, 1.0, size).to(moments).repeat_interleave(width // layers)
    values, vectors = torch.linalg.eigh(moments / size / size[:, None])
    count = max(1, round(rank * width))
    kept = float(values[-count:].sum() / values.sum().clamp_min(torch.finfo(values.dtype).tiny))
    vectors = vectors[:, -count:].flip(-1)
    return Linear((vectors / size[:, None]).float()[None], (vectors * size[:, None]).T.float().contiguous()[None]), kept
