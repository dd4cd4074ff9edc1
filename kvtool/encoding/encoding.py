"""One side (K or V) of one layer's coded entries: transforms, outliers, codec, error basis, in this order.

    z = Tₙ(… T₁(x)); (bare, outliers) = split(z); parts = codec(bare); error basis of (z − decoded)
    x̂ = T₁⁻¹(… Tₙ⁻¹(decoded + error, with the outliers put back))

Keys may be stored before RoPE (`rotated=False`): the cache turns them back before encoding and forward again after
decoding, by the positions that it keeps. Attention runs on the written form itself wherever `readable` has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from kvtool.encoding.codecs import Codec, Parts, Raw
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.encoding.transforms import Join, Linear, Transform
from kvtool.errors import InputError
from kvtool.records import Record, tensors_of
from kvtool_kernels.packed import Packed


@dataclass(frozen=True)
class Encoding(Record):
    """What happens to one side. Empty: entries are held as they are."""

    codec: Codec = field(default_factory=Raw)
    transforms: tuple[Transform, ...] = ()
    outliers: Outliers | None = None
    error: ErrorBasis | None = None
    rotated: bool = True

    @property
    def lossless(self) -> bool:
        return self.codec.lossless and not self.transforms and self.outliers is None and self.error is None

    @property
    def fits(self) -> bool:
        """Must it be fitted to a prompt before it is used?"""
        return self.codec.fits or any(step.fits for step in self.transforms)

    @property
    def observed(self) -> int:
        """How many of the prompt's newest queries the fit looks at; −1 all."""
        each = [step.observed for step in self.transforms]
        return -1 if -1 in each else max(each, default=0)

    def fitted(self, x: torch.Tensor, q: torch.Tensor | None) -> Encoding:
        """This encoding for a prompt: x [1,K,S,D] its entries, q [1,K,N,D] its observed queries."""
        steps = []
        for step in self.transforms:
            step = step.fit(x, q)
            x, q = step.forward(x), None if q is None else step.query(q)[0]
            steps.append(step)
        return replace(self, transforms=tuple(steps), codec=self.codec.fit(x))

    @property
    def joint(self) -> bool:
        """Of values: are they written with their keys?"""
        return self.codec.elsewhere

    @property
    def block(self) -> int:
        """Entries that must be encoded together: a common multiple of every part's."""
        parts = [self.codec.block]
        parts += [self.outliers.block] if self.outliers is not None else []
        parts += [self.error.block] if self.error is not None else []
        return math.lcm(*parts)

    @property
    def direct(self) -> bool:
        """Is what the codec writes all there is, of entries as attention sees them up to transforms?"""
        return self.outliers is None and self.error is None and self.rotated

    @property
    def joined(self) -> int:
        """How many neighbouring KV heads the transforms mix."""
        return math.prod(step.joined() for step in self.transforms)

    @property
    def mixes(self) -> bool:
        """Are several KV heads written as one, so that all must hold the same entries?"""
        return self.joined > 1 or self.codec.mixes

    @property
    def commutes(self) -> bool:
        """May the transforms stand on either side of RoPE? Of joined heads no step knows which channels pair up."""
        return self.joined == 1 and all(step.commutes for step in self.transforms)

    def then(self, other: Encoding) -> Encoding:
        """Both, one after the other: the transforms of the first, then everything of the second."""
        if self.lossless:
            return other
        if other.lossless:
            return self
        if not self.codec.lossless or self.outliers is not None or self.error is not None:
            raise InputError(
                "both plans write numbers down", got=f"{type(self.codec).__name__} and {type(other.codec).__name__}",
                expected="a first plan that only transforms", remedy="put the plan with the transform first",
            )  # fmt: skip
        if self.rotated and not other.rotated and not self.commutes:
            raise InputError(
                "the first plan transforms keys after RoPE, the second stores them before it",
                remedy="calibrate both for keys on the same side of RoPE",
            )
        rotated = self.rotated and other.rotated
        return replace(other, transforms=self.transforms + other.transforms, rotated=rotated)

    def check(self, kv_heads: int, width: int) -> None:
        """Raise InputError unless this can encode `kv_heads` heads of `width` channels."""
        if kv_heads % self.joined:
            raise InputError(
                "transforms that mix heads", got=f"{kv_heads} heads", expected=f"a multiple of {self.joined}"
            )
        for step in self.transforms:
            width, kv_heads = step.width(width), kv_heads // step.joined()
            for tensor in tensors_of(step):
                if len(tensor) not in (1, kv_heads):
                    raise InputError(f"a {type(step).__name__} of {len(tensor)} heads", expected=kv_heads)
        self.codec.check(kv_heads, width)
        if self.outliers is not None:
            self.outliers.check(kv_heads, width)

    def heads(self, indices: list[int], of: int) -> Encoding:
        """The encoding of these of a layer's `of` KV heads; raises InputError when a transform mixes others in."""
        if len(indices) == of:
            return self
        if self.mixes:
            raise InputError(
                "a transform mixes KV heads that do not hold the same entries", got=f"heads {indices} of {of}",
                remedy="compose with a plan that keeps the same entries in every head, or stores heads apart",
            )  # fmt: skip
        steps = tuple(step.heads(indices) for step in self.transforms)
        outliers = None if self.outliers is None else self.outliers.heads(indices)
        return replace(self, codec=self.codec.heads(indices), transforms=steps, outliers=outliers)

    def encode(self, x: torch.Tensor) -> Parts:
        """x [B,K,S,D], S a multiple of `block`."""
        z = x
        for step in self.transforms:
            z = step.forward(z)
        bare, kept = (z, {}) if self.outliers is None else self.outliers.split(z)
        parts = self.codec.encode(bare) | kept
        if self.error is not None:
            parts |= self.error.of(z.float() - self._decoded(parts, z.shape[-1]))
        return parts

    def coarser(self, parts: Parts, other: Encoding) -> Parts | None:
        """`parts` as `other` writes them, by dropping bits; None where that cannot be."""
        plain = not (self.transforms or other.transforms) and self.direct and other.direct
        return self.codec.coarser(parts, other.codec) if plain else None

    def _decoded(self, parts: Parts, width: int) -> torch.Tensor:
        z = self.codec.decode(parts, width)
        return z if self.outliers is None else self.outliers.join(z, parts)

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        """x̂ fp32 [B,K,S,D] for heads of `width` channels."""
        return self._inverse(self._restored(parts, width))

    def _restored(self, parts: Parts, width: int) -> torch.Tensor:
        """ẑ fp32 [B,K',S,r] for heads of `width` channels."""
        z = self._decoded(parts, self.written(width))
        return z if self.error is None else self.error.add(z, parts)

    def _inverse(self, z: torch.Tensor) -> torch.Tensor:
        for step in reversed(self.transforms):
            z = step.inverse(z)
        return z

    def written(self, width: int) -> int:
        """r for heads of `width` channels."""
        for step in self.transforms:
            width = step.width(width)
        return width

    def packed(self, parts: Parts) -> Packed | torch.Tensor | None:
        """What kernels read: z, not x̂. None when they cannot."""
        return self.readable(parts) if self.rotated else None

    def readable(self, parts: Parts) -> Packed | torch.Tensor | None:
        """z, on either side of RoPE, in the form that kernels read; None where the codec or residuals have none."""
        if self.error is not None or (self.outliers is not None and self.outliers.axis == "token"):
            return None
        bare = self.codec.packed(parts)
        if self.outliers is None or bare is None:
            return bare
        return replace(bare, outliers=self.outliers.kept(parts)) if isinstance(bare, Packed) else None

    def latent(self, parts: Parts, width: int) -> Packed | torch.Tensor:
        """z as `readable`, or decoded where it is not."""
        z = self.readable(parts)
        return self._restored(parts, width) if z is None else z

    def back(self, kv_heads: int, width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """M fp32 [K'|1,r,n·D] and c [K'|1,n·D] of x̂ = ẑ·M + c for n joined heads side by side; None: 1 and 0."""
        steps = self.transforms[1:] if isinstance(next(iter(self.transforms), None), Join) else self.transforms
        if not steps:
            return None, None
        if len(steps) == 1 and isinstance(steps[0], Linear):
            return steps[0].up, steps[0].mean
        rank = self.written(width)
        device = next((tensor.device for tensor in tensors_of(self)), None)
        probes = torch.eye(rank + 1, rank, dtype=torch.float32, device=device)
        probes = probes.expand(1, kv_heads // self.joined, -1, -1)
        wide = Join(self.joined).forward(self._inverse(probes))[0]
        return wide[:, :rank] - wide[:, rank:], wide[:, rank]

    def query(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q [B,K,N,D] → q̃ [B,K',N',r] and what is added to q̃·ẑ, [B,K',N'] or None."""
        total = None
        for step in self.transforms:
            wide, offset = step.query(q)
            if total is not None and total.shape != wide.shape[:-1]:
                total = total.reshape(wide.shape[:-1])
            if offset is not None:
                total = offset if total is None else total + offset
            q = wide
        return q, total

    def output(self, o: torch.Tensor, rows: int) -> torch.Tensor:
        """Weighted means of ẑ, [B,K',N',r] → of x̂, [B,K,N,D]; `rows` is N."""
        rows *= self.joined  # a head's rows once heads are joined are those of all of them
        for step in reversed(self.transforms):
            rows //= step.joined()
            o = step.output(o, rows)
        return o
