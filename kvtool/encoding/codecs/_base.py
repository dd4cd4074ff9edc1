"""What a codec must do.

    parts = encode(z);   ẑ = decode(parts)

`parts` maps names to tensors with the batch on axis 0 and entries, or groups of entries, on axis 2, so appending is
concatenation there and nothing that was written is written again. `packed(parts)` is the form that kernels read
without decoding (see `kvtool_kernels/packed.py`), a dense tensor for codecs that are one. A codec made of others puts
their names before those of their parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch

from kvtool.records import Record
from kvtool_kernels.packed import Packed

Parts = dict[str, torch.Tensor]
T = TypeVar("T")


class Codec(Record, ABC):
    """One way of writing numbers."""

    @property
    def block(self) -> int:
        """Entries that are encoded together."""
        return 1

    @property
    def lossless(self) -> bool:
        return False

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        """Which parts are packed codes: their bits, and the axis along which a run of them lies, token or channel."""
        return {}

    @property
    def fits(self) -> bool:
        """Must it be fitted to a prompt before it is used (see `fitted.py`)?"""
        return False

    def fit(self, z: torch.Tensor) -> Codec:
        """The codec for a prompt's entries z [1,K,S,r]."""
        return self

    @property
    def mixes(self) -> bool:
        """Does it write several KV heads as one?"""
        return False

    @property
    def elsewhere(self) -> bool:
        """Are its entries written by the other side (see `with_keys.py`)?"""
        return False

    @abstractmethod
    def encode(self, z: torch.Tensor) -> Parts:
        """z [B,K,S,r], S a multiple of `block`."""

    @abstractmethod
    def packed(self, parts: Parts) -> Packed | torch.Tensor | None:
        """The form that kernels read, or None when they cannot."""

    @abstractmethod
    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        """ẑ fp32 [B,K,S,r], r = `width`."""

    def coarser(self, parts: Parts, other: Codec) -> Parts | None:
        """`parts` as `other` writes them, by dropping bits; None where that cannot be."""
        return None

    def check(self, heads: int, width: int) -> None:
        """Raise InputError unless this can write `heads` heads of `width` channels."""

    def heads(self, indices: list[int]) -> Codec:
        """The codec of these heads of the layer."""
        return self


def named(name: str, parts: dict[str, T]) -> dict[str, T]:
    """The parts of an inner codec, or what is known of them, under its name."""
    return {f"{name}.{part}": value for part, value in parts.items()}


def parts_of(name: str, parts: Parts) -> Parts:
    """The inverse: what `parts` holds of that codec."""
    return {part.removeprefix(f"{name}."): tensor for part, tensor in parts.items() if part.startswith(f"{name}.")}
