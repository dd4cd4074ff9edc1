"""Encodings of one side that may be weighed against one another, for every layer, and the bits that they take.

    bits      min–max codes: keys per channel along tokens, values per token along channels
    rank      z = x·A·U, x̂ = z·Uᵀ·A⁻¹ in fp16: the rank-r map that errs least in the metric A² = E m mᵀ, U the top
              eigenvectors of A·E[x xᵀ]·A;  m: what an error meets (queries for keys, gradients for values)
    channels  the r channels c with the largest E x_c² · E m_c², in fp16
    latent    rank, then codes along tokens
    shared    rank, of the joined heads of n adjacent layers: x has n·K·D channels, A² is that of every head by itself,
              in what an error costs there, and U mixes heads and layers; or latent of that

Shapes: L layers, K KV heads, D head dim, C = K·D, n layers of a group. All matrices but those of `shared` are per KV
head, after RoPE unless `before` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import gcd
from typing import TypeVar

import torch

from kvtool.encoding.codecs import Affine, Raw
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Gather, Join, Linear, Transform
from kvtool.rotary import Rotary

TURNS = 64  # positions over which a metric is turned back at most
DAMPING = 1e-3  # of a metric's mean eigenvalue: directions that nothing met still count a little
SIXTEEN = "16"  # held as 16-bit numbers
Side = str  # "keys" or "values"
Step = TypeVar("Step", bound=Transform)


@dataclass(frozen=True)
class Candidate:
    """One way to hold a side: `encodings` has one a layer, or one for all, or one for each of the `groups` of layers
    that it writes as one, which are then all layers that it is for."""

    name: str
    encodings: tuple[Encoding, ...]
    groups: tuple[tuple[int, ...], ...] = ()

    def of(self, layer: int) -> Encoding:
        """That of a layer, or of its group."""
        if self.groups:
            return self.encodings[self._number(layer)]
        return self.encodings[layer if len(self.encodings) > 1 else 0]

    def group(self, layer: int) -> tuple[int, ...]:
        """The layers that are written as one with this one."""
        return self.groups[self._number(layer)] if self.groups else (layer,)

    def _number(self, layer: int) -> int:
        return next(number for number, group in enumerate(self.groups) if layer in group)

    @property
    def reach(self) -> int:
        """The most layers that it writes as one; 0 if heads are apart."""
        return max(map(len, self.groups), default=0)

    def fits(self, span: Sequence[int]) -> bool:
        """May these layers be written as one by it? Its groups there must be whole and alike."""
        groups = [group for group in self.groups if set(group) & set(span)]
        whole = sum(len(group) for group in groups) == len(span) and len({len(group) for group in groups}) == 1
        return whole or not self.groups

    def over(self, span: Sequence[int]) -> Encoding:
        """The encoding of these layers, written as one, the heads of each before those of the next."""
        firsts = sorted({self.group(layer)[0] for layer in span})
        return _beside([self.of(layer) for layer in (firsts if len(self.encodings) > 1 else firsts[:1])])

    def bits(self, kv_heads: int, width: int) -> float:
        """Bits a number, measured on what it writes: scales are in, what all entries share is not."""
        encoding = self.encodings[0]
        x = torch.zeros(1, len(self.groups[0]) * kv_heads if self.groups else kv_heads, encoding.block, width)
        return 8 * sum(part.nbytes for part in encoding.encode(x).values()) / x.numel()

    def before(self) -> Candidate:
        """The same for keys before RoPE."""
        encodings = tuple(replace(each, rotated=False) for each in self.encodings)
        return replace(self, name=f"{self.name} before", encodings=encodings)


def _beside(encodings: Sequence[Encoding]) -> Encoding:
    """Encodings that differ in their tables alone as one for the heads of all."""
    steps = zip(*(each.transforms for each in encodings), strict=True)
    return replace(encodings[0], transforms=tuple(_stacked(each) for each in steps))


def _stacked(steps: Sequence[Step]) -> Step:
    """One step for the heads of all, whose tables lead with heads."""
    names = [field.name for field in fields(steps[0]) if isinstance(getattr(steps[0], field.name), torch.Tensor)]  # type: ignore[arg-type]
    return replace(steps[0], **{name: torch.cat([getattr(step, name) for step in steps]) for name in names})  # type: ignore[type-var]


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
    mean = values.mean(-1, keepdim=True)
    root = (values.clamp_min(0) / torch.where(mean > 0, mean, 1.0) + DAMPING).sqrt()
    toward = (vectors * root[..., None, :]) @ vectors.mT
    back = (vectors / root[..., None, :]) @ vectors.mT
    top = torch.linalg.eigh(toward @ gram @ toward)[1][..., -rank:].flip(-1)
    down, up = (toward @ top).float(), (top.mT @ back).float()
    return [Linear(*pair) for pair in zip(down, up, strict=True)]


def shared(
    moments: Callable[[tuple[int, ...]], torch.Tensor],
    metric: torch.Tensor,
    groups: Sequence[tuple[int, ...]],
    shares: Iterable[float],
) -> list[Candidate]:
    """One basis for each of `groups` of layers, at every share of their channels. moments(group): [n·C,n·C];
    metric [L,K,D,D] second moments of what errors meet, so that those of different heads can be compared."""
    kv_heads, width = metric.shape[1:3]
    counts = widths(shares, kv_heads * width)
    steps: dict[int, list[Encoding]] = {count: [] for count in counts}
    for group in groups:
        joint = torch.block_diag(*metric[list(group)].flatten(0, 1))
        (whole,) = bases(moments(group)[None, None], joint[None, None], len(joint))
        for count in counts:
            rank = count * len(group)
            step = Linear(whole.down[..., :rank].contiguous(), whole.up[:, :rank].contiguous())
            steps[count].append(Encoding(Raw("float16"), (Join(len(group) * kv_heads), step)))
    most = max(map(len, groups))
    return [Candidate(f"rank {count * most} of {most} layers", tuple(steps[count]), tuple(groups)) for count in counts]


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
    encodings = tuple(replace(each, codec=codec) for each in base.encodings)
    return replace(base, name=f"{base.name} in {bits} bits", encodings=encodings)


def _wrapped(step: Transform) -> Encoding:
    return Encoding(Raw("float16"), (step,))


def widths(shares: Iterable[float], width: int) -> list[int]:
    """Shares of a width as whole numbers of channels, each once, without the whole width."""
    return sorted({count for share in shares if (count := max(1, round(share * width))) < width})


def blocks(joint: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[L,C,C] over the channels of all KV heads → [L,K,D,D], each head's own."""
    grid = joint.unflatten(1, (kv_heads, -1)).unflatten(3, (kv_heads, -1))
    return grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
