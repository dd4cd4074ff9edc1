"""Encodings of one side that may be weighed against one another, for every layer, and the bits that they take.

    bits      min–max codes: keys per channel along tokens, values per token along channels
    rank      z = x·A·U, x̂ = z·Uᵀ·A⁻¹ in fp16: the rank-r map that errs least in the metric A² = E m mᵀ, U the top
              eigenvectors of A·E[x xᵀ]·A;  m: what an error meets (queries for keys, gradients for values)
    channels  the r channels c with the largest E x_c² · E m_c², in fp16
    latent    rank, then codes along tokens

Shapes: L layers, K KV heads, D head dim. All matrices are per KV head, after RoPE unless `before` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch

from kvtool.encoding.codecs import Affine, Raw
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Gather, Linear, Transform
from kvtool.rotary import Rotary

TURNS = 64  # positions over which a metric is turned back at most
DAMPING = 1e-3  # of a metric's mean eigenvalue: directions that nothing met still count a little
SIXTEEN = "16"  # held as 16-bit numbers
Side = str  # "keys" or "values"


@dataclass(frozen=True)
class Candidate:
    """One way to hold a side: `encodings` has one a layer, or one for all."""

    name: str
    encodings: tuple[Encoding, ...]

    def of(self, layer: int) -> Encoding:
        return self.encodings[layer if len(self.encodings) > 1 else 0]

    def bits(self, kv_heads: int, width: int) -> float:
        """Bits a number, measured on what it writes: scales are in, what all entries share is not."""
        encoding = self.of(0)
        x = torch.zeros(1, kv_heads, encoding.block, width)
        return 8 * sum(part.nbytes for part in encoding.encode(x).values()) / x.numel()

    def before(self) -> Candidate:
        """The same for keys before RoPE."""
        return Candidate(f"{self.name} before", tuple(replace(each, rotated=False) for each in self.encodings))


def sixteen() -> Candidate:
    return Candidate(SIXTEEN, (Encoding(Raw("float16")),))


def coded(side: Side, bits: int, group: int, width: int) -> Candidate:
    """`bits` a number, groups of `group` tokens or of as many channels as divide the width."""
    codec = Affine(bits, group, "token") if side == "keys" else Affine(bits, gcd(group, width), "channel")
    return Candidate(f"{bits} bits", (Encoding(codec),))


def low_rank(gram: torch.Tensor, metric: torch.Tensor | None, rank: int) -> Candidate:
    """gram, metric [L,K,D,D] second moments of entries and of what they meet (None: all directions alike)."""
    return Candidate(f"rank {rank}", tuple(_wrapped(step) for step in bases(gram, metric, rank)))


def bases(gram: torch.Tensor, metric: torch.Tensor | None, rank: int) -> list[Linear]:
    """The least-squares map of every layer to `rank` numbers and back."""
    gram = gram.double()
    metric = torch.eye(gram.shape[-1], dtype=torch.float64).expand(gram.shape) if metric is None else metric.double()
    values, vectors = torch.linalg.eigh(metric)
    floor = DAMPING * values.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    root = (values.clamp_min(0) + floor).sqrt()
    toward = (vectors * root[..., None, :]) @ vectors.mT
    back = (vectors / root[..., None, :]) @ vectors.mT
    top = torch.linalg.eigh(toward @ gram @ toward)[1][..., -rank:].flip(-1)
    down, up = (toward @ top).float(), (top.mT @ back).float()
    return [Linear(*pair) for pair in zip(down, up, strict=True)]


def channels(gram: torch.Tensor, metric: torch.Tensor, count: int) -> Candidate:
    """gram, metric [L,K,D,D]: only their diagonals matter."""
    score = gram.diagonal(dim1=-2, dim2=-1) * metric.diagonal(dim1=-2, dim2=-1)
    index = score.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values
    return Candidate(f"{count} channels", tuple(_wrapped(Gather(each, gram.shape[-1])) for each in index))


def unturned(metric: torch.Tensor, rotaries: Sequence[Rotary], positions: int, device: torch.device) -> torch.Tensor:
    """E Rᵀ m mᵀ R over so many positions of keys: what an error of keys before RoPE meets. metric [L,K,D,D]."""
    places = torch.linspace(0, positions - 1, min(TURNS, positions)).round().long().to(device)
    made = []
    for each, rotary in zip(metric.double(), rotaries, strict=True):
        values, vectors = torch.linalg.eigh(each)
        rows = (vectors * values.clamp_min(0).sqrt()[..., None, :]).mT.float().to(device)  # [K,D,D], a row a direction
        table = rotary.table(places.repeat_interleave(rows.shape[1]))
        back = rotary.unrotate(rows.repeat(1, len(places), 1)[None], table)[0].double().cpu()
        made.append(back.mT @ back / len(places))
    return torch.stack(made)


def latent(base: Candidate, bits: int, group: int) -> Candidate:
    """What a candidate of rank r leaves, in codes."""
    codec = Affine(bits, group, "token")
    return Candidate(f"{base.name} in {bits} bits", tuple(replace(each, codec=codec) for each in base.encodings))


def _wrapped(step: Transform) -> Encoding:
    return Encoding(Raw("float16"), (step,))


def widths(shares: Iterable[float], width: int) -> list[int]:
    """Shares of a head's width as whole numbers of channels, each once, without the whole width."""
    return sorted({count for share in shares if (count := max(1, round(share * width))) < width})


def blocks(joint: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[L,C,C] over the channels of all KV heads → [L,K,D,D], each head's own."""
    grid = joint.unflatten(1, (kv_heads, -1)).unflatten(3, (kv_heads, -1))
    return grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
