"""How the queries of a decode step score the entries that they attend to, as `attend_evict` defines it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtool_kernels.mixing import Mix


@dataclass(frozen=True)
class Scoring:
    """heat: τ of the softmax that scores. noise: ζ [G,S] of each KV head, the same for all rows. past: queries
    [B,H,N,D] of the tokens just before, which score too; not beside noise. kernel: places that are pooled, to their
    mean or to their `peak`. group: "sum", "mean" or "max" over the query heads of a KV head. mix: a mixture in place of
    all these, for heads that are alike. decay, largest: how scores from before join. alike: KV heads go by their mean.
    """

    heat: float = 1.0
    noise: Sequence[torch.Tensor] = ()
    past: torch.Tensor | None = None
    kernel: int = 1
    peak: bool = False
    group: str = "mean"
    mix: Mix | None = None
    decay: float = 1.0
    largest: bool = False
    alike: bool = False


SOFTMAX = Scoring()  # the mean of what the query heads pay, and no more
