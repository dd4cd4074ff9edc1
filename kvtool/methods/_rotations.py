"""What methods share that turn entries by random matrices: the matrices, and which channels of a head are loud.

D head dim, L layers, K KV heads. Matrices are fp32, drawn in fp64, the same for the same seed.
"""

from __future__ import annotations

import torch

from kvtool.corpus.text import text
from kvtool.errors import InputError
from kvtool.methods._base import Context
from kvtool.profile import profile
from kvtool.trace import Trace, statistic


def rotation(width: int, draw: torch.Generator) -> torch.Tensor:
    """[D,D], orthogonal, uniform among all such matrices."""
    basis, triangle = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))
    return (basis * triangle.diagonal().sign()).float()


def sketch(width: int, copies: int, draw: torch.Generator) -> torch.Tensor:
    """[D,copies·D]: rotations side by side, whose columns have the length √D that Gaussian ones have."""
    return torch.cat([rotation(width, draw) for _ in range(copies)], dim=1) * width**0.5


def loudest(seen: Trace, kind: str) -> torch.Tensor:
    """int64 [L,K,D]: a head's channels by their mean square, largest first; `kind` as in the statistic `channels`."""
    return seen["channels"][f"{kind}.square"].argsort(dim=-1, descending=True, stable=True)


def channels(context: Context, *, samples: int, tokens: int) -> Trace:
    """A trace with the statistic `channels`: the one at hand, else what the model shows on `samples` texts of `tokens`
    tokens, of the half of the default text that calibration may see. Raises InputError where there is neither."""
    if context.trace is not None and "channels" in context.trace.statistics:
        return context.trace
    if context.model is None and context.load is None:
        raise InputError(
            "these options need to know which channels are loud", got="a trace without the statistic channels",
            remedy="profile with --stat channels, or pass the model",
        )  # fmt: skip
    model = context.running
    seen = Trace(model.fingerprint, model.name, {"channels": statistic("channels")(model, model.geometry)})
    corpus = text(model, tokens=tokens, samples=samples, seed=context.seed, half="calibration")
    profile(model, seen, {"text": corpus})
    return seen
