"""Values that are written with their keys: nothing of their own.

    key's side:  z = [k | k⁰ | v] of every head, side by side, through the key's transforms and codec
    value's side: no parts;   v̂ is the last third of ẑ turned back

k⁰ is the key turned to position 0: what is made of it meets queries turned to position 0, so that RoPE has no say. An
encoding may draw on either part of a key, or on both. Shapes as in `encoding.py`; a key's side is SIDES·D wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtool.encoding.codecs._base import Codec, Parts

SIDES = 3


@dataclass(frozen=True)
class WithKeys(Codec):
    """Stands where the values' codec would."""

    @property
    def elsewhere(self) -> bool:
        return True

    def encode(self, z: torch.Tensor) -> Parts:
        return {}

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        raise AssertionError("the key's side holds these values")
