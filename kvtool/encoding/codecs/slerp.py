"""Two layers along one direction: each entry's shared unit vector, and the norm that it has in either layer.

    u = x / ‖x‖,   Ω = arccos(u¹·u²)
    e = (sin((1 − t)Ω)·u¹ + sin(tΩ)·u²) / sin Ω,   x̂ⁱ = ‖xⁱ‖·ê      ê: e as `inner` writes it, of length 1 again

(MiniCache: Liu et al., arXiv 2405.14366; see `kvtool/methods/minicache.py`.) The heads are those of two layers, so it
stands in a span of two (`Store.first`), the first layer's K heads before the second's. Where the angle is below `NEAR`
the mean takes the place of the arc. Where the two are opposite there is no arc, and where one is zero no angle: there e
is the direction of the longer one, which a zero vector does not notice.

Of each `among` entries the share `retain`, those with the smallest cosine, are kept as they are, in both layers: the
capacity is fixed, so that an entry's bytes do not depend on what it holds. Shapes: z [B,2K,S,r].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from kvtool.encoding.codecs._base import Codec, Parts, named, parts_of
from kvtool.encoding.codecs._groups import written
from kvtool.encoding.codecs.raw import Raw
from kvtool.errors import InputError
from kvtool_kernels.precision import wide

NEAR = 1e-3  # radians from 0, or from π


@dataclass(frozen=True)
class Slerp(Codec):
    """t: where on the arc the direction lies, from the first layer's (0) to the second's (1). inner: how it is written.
    retain: share of each `among` entries that is kept as it is."""

    t: float = 0.5
    retain: float = 0.0
    among: int = 32
    inner: Codec = field(default_factory=lambda: Raw("float16"))

    def __post_init__(self) -> None:
        if not (0 <= self.t <= 1 and 0 <= self.retain <= 1):
            raise InputError("bad arc", got=f"t {self.t}, retain {self.retain}", expected="shares from 0 to 1")
        if not 1 <= self.among <= 256:
            raise InputError("bad choice of entries", got=f"among {self.among}", expected="1 to 256 entries")

    @property
    def block(self) -> int:
        return math.lcm(self.among, self.inner.block)

    @property
    def lossless(self) -> bool:
        return self.kept == self.among

    @property
    def mixes(self) -> bool:
        return True

    @property
    def kept(self) -> int:
        """Entries of each `among` that stay as they are."""
        return math.ceil(self.retain * self.among - 1e-9)

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        return named("direction", self.inner.codes)

    def check(self, heads: int, width: int) -> None:
        if heads % 2:
            raise InputError("one direction for two layers", got=f"{heads} heads", expected="a span of two layers")
        self.inner.check(heads // 2, width)

    def encode(self, z: torch.Tensor) -> Parts:
        """Parts: those of the direction [B,K,S,r]; norms [B,2K,S]; uint8 index [B,K,S/among,kept] and value
        [B,2K,S/among,kept,r] of what stays."""
        (first, one), (second, two) = (_polar(x) for x in wide(z).chunk(2, dim=1))
        cosine = (first * second).sum(-1).clamp(-1, 1)
        shared = _polar(self._arc(first, second, cosine, one < two, (one == 0) | (two == 0)))[0]
        norm, _ = written(torch.cat([one, two], dim=1))
        parts = named("direction", self.inner.encode(shared.to(z.dtype))) | {"norm": norm}
        if self.kept:
            closeness = torch.where((one == 0) | (two == 0), torch.inf, cosine).unflatten(2, (-1, self.among))
            index = closeness.topk(self.kept, dim=-1, largest=False).indices.sort(-1).values
            parts["apart.index"] = index.to(torch.uint8)
            parts["apart.value"] = z.unflatten(2, (-1, self.among)).gather(3, _everywhere(index, z.shape[-1]))
        return parts

    def _arc(
        self, first: torch.Tensor, second: torch.Tensor, cosine: torch.Tensor, longer: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        """Unit vectors [B,K,S,r] → a vector along the shared direction; longer: is the second? zero: is one?"""
        angle = torch.arccos(cosine)
        sine = torch.where(angle < NEAR, 1.0, angle.sin())
        near = (angle < NEAR) & ~zero
        alone = (angle > math.pi - NEAR) | zero
        mine = torch.where(near, 1 - self.t, ((1 - self.t) * angle).sin() / sine)
        theirs = torch.where(near, self.t, (self.t * angle).sin() / sine)
        mine = torch.where(alone, (~longer).to(mine.dtype), mine)
        theirs = torch.where(alone, longer.to(theirs.dtype), theirs)
        return mine[..., None] * first + theirs[..., None] * second

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        shared = _polar(self.inner.decode(parts_of("direction", parts), width))[0]
        z = shared.repeat(1, 2, 1, 1) * parts["norm"].float()[..., None]
        if not self.kept:
            return z
        index = _everywhere(parts["apart.index"].long(), width)
        return z.unflatten(2, (-1, self.among)).scatter(3, index, parts["apart.value"].float()).flatten(2, 3)


def _polar(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [...,r] → unit vectors, zero where x is, and norms [...]; squares neither overflow nor vanish."""
    size = x.abs().amax(-1, keepdim=True)
    unit = x / torch.where(size == 0, 1.0, size)
    length = unit.norm(dim=-1, keepdim=True)
    return unit / torch.where(size == 0, 1.0, length), (size * length)[..., 0]


def _everywhere(index: torch.Tensor, width: int) -> torch.Tensor:
    """int64 [B,K,n,kept] → [B,2K,n,kept,width]: the same entries of both layers."""
    return index.repeat(1, 2, 1, 1)[..., None].expand(-1, -1, -1, -1, width)
