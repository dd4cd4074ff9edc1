"""Linear changes of basis of one side (K or V) of a layer's entries, before the codec.

    z = forward(x);   x̂ = inverse(ẑ) = ẑ·M + c
    q·x̂ = query(q)·ẑ + offset(q);   Σ pⱼ x̂ⱼ = output(Σ pⱼ ẑⱼ)  if Σ pⱼ = 1

So attention runs on ẑ itself: the query takes M for keys, the output for values, and nothing is undone per entry.
`commutes` says whether the map may be applied on either side of RoPE. Tensors that differ by KV head lead with K (or
1 when all share one); `heads(indices)` gives the same transform for some of a layer's heads.

Shapes: B batch, K KV heads, S entries, N query rows of a KV head (group × tokens), D head dim, r width of z.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from kvtool.errors import InputError
from kvtool.records import Record
from kvtool_kernels.ops import hadamard


class Transform(Record, ABC):
    """One step between entries as attention sees them and what the codec is given."""

    @property
    def commutes(self) -> bool:
        """Does it commute with RoPE in the half-split layout? If not, it must stand on the side it was made for."""
        return False

    @property
    def fits(self) -> bool:
        """Must it be fitted to a prompt before it is used (see `fitted.py`)?"""
        return False

    @property
    def observed(self) -> int:
        """How many of the prompt's newest queries `fit` looks at; −1 all."""
        return 0

    def fit(self, x: torch.Tensor, q: torch.Tensor | None) -> Transform:
        """The transform for a prompt: x [1,K,S,D] its entries before this step, q [1,K,N,D] its observed queries."""
        return self

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,K,S,D] → z [B,K',S,r]."""

    @abstractmethod
    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """z [B,K',S,r] → x̂ [B,K,S,D]."""

    @abstractmethod
    def query(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q [B,K,N,D] → what meets ẑ, [B,K',N',r], and what is added to q·ẑ, [B,K',N'] or None."""

    def output(self, o: torch.Tensor, rows: int) -> torch.Tensor:
        """Weighted means of ẑ, [B,K',N',r] → of x̂, [B,K,N,D]; `rows` is N."""
        return self.inverse(o)

    @abstractmethod
    def width(self, width: int) -> int:
        """r for a given D."""

    def joined(self) -> int:
        """How many neighbouring KV heads become one."""
        return 1

    @abstractmethod
    def heads(self, indices: list[int]) -> Transform:
        """The transform of these heads of the layer."""


def _fits(step: Transform, made_for: int, width: int) -> int:
    if width != made_for:
        raise InputError(f"a {type(step).__name__} for heads of another width", got=made_for, expected=width)
    return width


def _some(tensor: torch.Tensor, indices: list[int]) -> torch.Tensor:
    return tensor if len(tensor) == 1 else tensor[indices]


@dataclass(frozen=True)
class Scale(Transform):
    """z = x / scale, fp32 [K|1,D]."""

    scale: torch.Tensor

    @property
    def commutes(self) -> bool:
        first, second = self.scale.chunk(2, dim=-1)
        return bool(torch.equal(first, second))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.scale[:, None].to(x)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        return z * self.scale[:, None].to(z)

    def query(self, q: torch.Tensor) -> tuple[torch.Tensor, None]:
        return q * self.scale[:, None].to(q), None

    def width(self, width: int) -> int:
        return _fits(self, self.scale.shape[-1], width)

    def heads(self, indices: list[int]) -> Scale:
        return Scale(_some(self.scale, indices))


@dataclass(frozen=True)
class Gather(Transform):
    """z = x[index], int64 [K|1,r]: a permutation, or the channels that stay; absent channels come back as 0."""

    index: torch.Tensor
    of: int  # D

    def _full(self, x: torch.Tensor) -> torch.Tensor:
        return self.index[None, :, None].expand(len(x), x.shape[1], x.shape[2], -1).to(x.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.gather(-1, self._full(x))

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        return z.new_zeros(*z.shape[:-1], self.of).scatter(-1, self._full(z), z)

    def query(self, q: torch.Tensor) -> tuple[torch.Tensor, None]:
        return q.gather(-1, self._full(q)), None

    def width(self, width: int) -> int:
        _fits(self, self.of, width)
        return self.index.shape[-1]

    def heads(self, indices: list[int]) -> Gather:
        return Gather(_some(self.index, indices), self.of)


@dataclass(frozen=True)
class Hadamard(Transform):
    """z = x·H/√D, the orthonormal Walsh–Hadamard transform; D a power of two. Its own inverse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return hadamard(x)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        return hadamard(z)

    def query(self, q: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hadamard(q), None

    def width(self, width: int) -> int:
        if width & (width - 1):
            raise InputError("no Hadamard transform of this width", got=width, expected="a power of two")
        return width

    def heads(self, indices: list[int]) -> Hadamard:
        return self


@dataclass(frozen=True)
class Linear(Transform):
    """z = (x − mean)·down, x̂ = z·up + mean: rotations (up = downᵀ), PCA, low rank, scaled bases.

    down fp32 [K|1,D,r], up fp32 [K|1,r,D], mean fp32 [K|1,D] or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    mean: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bare = x if self.mean is None else x - self.mean[:, None].to(x)
        return bare @ self.down.to(x)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        x = z @ self.up.to(z)
        return x if self.mean is None else x + self.mean[:, None].to(z)

    def query(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        offset = None if self.mean is None else (q * self.mean[:, None].to(q)).sum(-1)
        return q @ self.up.transpose(-1, -2).to(q), offset

    def width(self, width: int) -> int:
        _fits(self, self.down.shape[-2], width)
        return self.down.shape[-1]

    def heads(self, indices: list[int]) -> Linear:
        mean = None if self.mean is None else _some(self.mean, indices)
        return replace(self, down=_some(self.down, indices), up=_some(self.up, indices), mean=mean)


@dataclass(frozen=True)
class Join(Transform):
    """`count` neighbouring KV heads become one of width count·D, so that what follows may mix them.

    Mixing equal channels of several heads commutes with RoPE, other mixing does not; the step itself moves nothing.
    """

    count: int

    @property
    def commutes(self) -> bool:
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, entries, width = x.shape
        grouped = x.reshape(batch, heads // self.count, self.count, entries, width)
        return grouped.transpose(2, 3).reshape(batch, heads // self.count, entries, self.count * width)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        batch, groups, entries, width = z.shape
        parts = z.reshape(batch, groups, entries, self.count, width // self.count)
        return parts.transpose(2, 3).reshape(batch, groups * self.count, entries, width // self.count)

    def query(self, q: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Each head's rows meet its own slice only: zeros elsewhere."""
        batch, heads, rows, width = q.shape
        wide = q.new_zeros(batch, heads // self.count, self.count, rows, self.count, width)
        parts = q.reshape(batch, heads // self.count, self.count, rows, width)
        for head in range(self.count):
            wide[:, :, head, :, head] = parts[:, :, head]
        return wide.reshape(batch, heads // self.count, self.count * rows, self.count * width), None

    def output(self, o: torch.Tensor, rows: int) -> torch.Tensor:
        batch, groups, _, width = o.shape
        parts = o.reshape(batch, groups, self.count, rows, self.count, width // self.count)
        own = torch.stack([parts[:, :, head, :, head] for head in range(self.count)], dim=2)
        return own.reshape(batch, groups * self.count, rows, width // self.count)

    def width(self, width: int) -> int:
        return self.count * width

    def joined(self) -> int:
        return self.count

    def heads(self, indices: list[int]) -> Join:
        return self
