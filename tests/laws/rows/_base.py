"""What the laws need to know of a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]
CALIBRATED: Options = dict(mode="calibrated", samples=2, tokens=240)
BRIEF: Options = dict(samples=1, tokens=40)  # what a calibrated mode reads


@dataclass(frozen=True)
class Row:
    """tiny: lossy within a few tokens; none for a method that changes no cache by itself. lossless: on sequences of
    up to 900 tokens. ladder: growing budgets for the induction model and repeats of 24 tokens, the last one lossless.
    loss: nats that the first one costs at least."""

    tiny: tuple[Options, ...]
    lossless: tuple[Options, ...]
    ladder: tuple[Options, ...]
    loss: float = 1.0
