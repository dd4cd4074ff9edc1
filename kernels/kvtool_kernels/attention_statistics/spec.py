"""What `attention_statistics` is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """q [H,T,D], k and v [K,T,D]; `size` is the logits' standard deviation, `offset` is added to all of them."""

    heads: int = 4
    kv_heads: int = 2
    tokens: int = 63
    width: int = 32
    cells: int = 1
    first: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    size: float = 1.0
    offset: float = 0.0

    def __str__(self) -> str:
        marks = {"cells": 1, "first": 0, "window": None, "softcap": None, "sinks": False, "size": 1.0, "offset": 0.0}
        named = [f"{name}={getattr(self, name)}" for name, plain in marks.items() if getattr(self, name) != plain]
        return "-".join([f"H{self.heads}-K{self.kv_heads}-T{self.tokens}-D{self.width}", *named])


CASES = (
    *(Case(tokens=tokens, cells=cells) for tokens in (1, 2, 63, 64, 65, 500) for cells in (1, 64)),
    Case(tokens=1000, heads=2, kv_heads=1),
    *(Case(tokens=tokens, window=window) for tokens in (63, 200) for window in (1, 7, 64, 100, 300)),
    *(Case(tokens=200, first=first, window=window) for first in (1, 100, 199) for window in (None, 50)),
    Case(heads=6, kv_heads=6, tokens=130, width=7, cells=10),
    Case(heads=6, kv_heads=1, tokens=130, cells=200),
    Case(tokens=130, softcap=3.0, size=5.0),
    Case(tokens=130, sinks=True, cells=64),
    Case(tokens=130, sinks=True, window=9, softcap=3.0, first=20, cells=8),
    Case(tokens=130, size=0.0),
    Case(tokens=130, size=100.0),
    Case(tokens=130, offset=300.0),
    Case(tokens=130, offset=-300.0, window=20),
)


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `attention_statistics`."""
    draw = torch.Generator().manual_seed(seed)
    scale = case.width**-0.5
    q = torch.randn(case.heads, case.tokens, case.width, generator=draw) * case.size
    k = torch.randn(case.kv_heads, case.tokens, case.width, generator=draw)
    if case.offset:  # the first channel adds the same to every logit
        q[..., 0], k[..., 0] = abs(case.offset) ** 0.5, case.offset / abs(case.offset) ** 0.5 / scale
    v = torch.randn(case.kv_heads, case.tokens, case.width, generator=draw)
    return {
        **{name: tensor.to(device, dtype) for name, tensor in zip("qkv", (q, k, v), strict=True)},
        "scale": scale,
        "cells": case.cells,
        "first": case.first,
        "window": case.window,
        "softcap": case.softcap,
        "sink_logits": torch.randn(case.heads, generator=draw).to(device) if case.sinks else None,
    }
