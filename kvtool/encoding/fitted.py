"""Changes of basis that each prompt makes for itself: fitted once to what leaves the raw window first, then fixed.

    step = fit(x, q)   x [1,K,S,D]: entries before the step;   q [1,K,N,D]: the queries that were observed

`fit` gives a transform of `transforms.py`, whose tensors belong to the cache of that one sequence and count among its
bytes. Rows of a batch are fitted one by one. Nothing that was written is fitted again, so later entries are written in
the basis of the prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvtool.encoding.codecs import Codec, Levels, Parts
from kvtool.encoding.transforms import Gather, Linear, Scale, Transform
from kvtool.errors import InputError


class Fitted(Transform, ABC):
    """A transform that is not known yet."""

    @property
    def fits(self) -> bool:
        return True

    @abstractmethod
    def fit(self, x: torch.Tensor, q: torch.Tensor | None) -> Transform:
        """The transform for these entries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("fitted before it is used")

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        raise AssertionError("fitted before it is used")

    def query(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise AssertionError("fitted before it is used")

    def width(self, width: int) -> int:
        return width

    def heads(self, indices: list[int]) -> Fitted:
        return self


@dataclass(frozen=True)
class Balance(Fitted):
    """Keys trade their range with the queries': z = x·b, b = √(max |q| / max |x|) per channel, within `limit` (MiKV).

    |z| and |q/b| then have the same largest value in every channel. All queries of the prompt are observed.
    """

    limit: float = 1e3

    @property
    def observed(self) -> int:
        return -1

    def fit(self, x: torch.Tensor, q: torch.Tensor | None) -> Scale:
        assert q is not None
        ratio = q[0].abs().amax(1).float() / x[0].abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny)
        return Scale(1 / ratio.sqrt().clamp(1 / self.limit, self.limit))


@dataclass(frozen=True)
class Root(Fitted):
    """z = x / c, c = √(max |x|) per channel (ZipCache's channel-separable values); a channel of zeros keeps 1."""

    def fit(self, x: torch.Tensor, q: torch.Tensor | None) -> Scale:
        size = x[0].abs().amax(1).float().sqrt()
        return Scale(torch.where(size == 0, torch.ones_like(size), size))


@dataclass(frozen=True)
class Strongest(Fitted):
    """The `count` channels with the largest mean q² · mean x² (ThinK); q: the newest `window` queries of the group."""

    count: int
    window: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.window < 1:
            raise InputError("bad choice of channels", got=f"{self.count} by {self.window} queries")

    @property
    def observed(self) -> int:
        return self.window

    def width(self, width: int) -> int:
        return min(self.count, width)

    def fit(self, x: torch.Tensor, q: torch.Tensor | None) -> Gather:
        assert q is not None
        score = q[0].float().square().mean(1) * x[0].float().square().mean(1)  # [K,D]
        kept = score.topk(min(self.count, x.shape[-1]), dim=-1).indices.sort(-1).values
        return Gather(kept, x.shape[-1])


@dataclass(frozen=True)
class Spread(Fitted):
    """The `wide` channels of the widest range, then the others, both in the order that they have in a head (VidKV)."""

    wide: int

    def fit(self, x: torch.Tensor, q: torch.Tensor | None) -> Gather:
        return Gather(widest(x[0].amax(1) - x[0].amin(1), self.wide), x.shape[-1])


def widest(ranges: torch.Tensor, count: int) -> torch.Tensor:
    """Ranges [K,D] of channels → int64 [K,D]: the `count` widest, then the others, both in ascending order."""
    order = ranges.argsort(dim=-1, descending=True, stable=True)
    return torch.cat([order[..., :count].sort(-1).values, order[..., count:].sort(-1).values], dim=-1)


@dataclass(frozen=True)
class Principal(Fitted):
    """The `rank` leading right singular vectors of the entries of each head, or of heads that were joined before.

    `normalise` so many equal slices of the channels by their own root mean square first, and undo it after, so that
    no loud layer or head takes the whole rank. Fewer, where the entries span fewer directions.
    """

    rank: int
    normalise: int = 1

    def width(self, width: int) -> int:
        return min(self.rank, width)

    def fit(self, x: torch.Tensor, q: torch.Tensor | None) -> Linear:
        rows = x[0].double()
        slices = rows.unflatten(-1, (self.normalise, -1))
        size = slices.square().mean((1, 3), keepdim=True).sqrt()
        size = torch.where(size == 0, torch.ones_like(size), size).expand_as(slices[:, :1]).flatten(2)  # [K,1,D]
        unit = rows / size
        energies, vectors = (x.flip(-1) for x in torch.linalg.eigh(unit.transpose(1, 2) @ unit))
        told = (
            energies > 1e-9 * energies[:, :1]
        )  # directions that the entries say nothing of would be drawn by rounding
        count = max(1, min(self.rank, int(told.sum(-1).max())))
        vectors = (vectors * told[:, None])[..., :count]
        return Linear((vectors / size.transpose(1, 2)).float(), (vectors.transpose(1, 2) * size).float())


@dataclass(frozen=True)
class Ranges(Codec):
    """Uniform codes of `bits` bits over each channel's range in the prompt (ZipCache's keys); what later entries hold
    beyond it takes the nearest end."""

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise InputError("bad bits", got=self.bits, expected="1 to 4")

    @property
    def fits(self) -> bool:
        return True

    def fit(self, z: torch.Tensor) -> Levels:
        low, high = z[0].amin(1).float(), z[0].amax(1).float()  # [K,r]
        levels = torch.linspace(-1, 1, 2**self.bits, dtype=torch.float32)
        return Levels(levels, 1, "channel", "fixed", (high - low) / 2, (high + low) / 2)

    def encode(self, z: torch.Tensor) -> Parts:
        raise AssertionError("fitted before it is used")

    def packed(self, parts: Parts) -> None:
        raise AssertionError("fitted before it is used")

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        raise AssertionError("fitted before it is used")
