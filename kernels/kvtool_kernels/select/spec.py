"""What `select` is tested and measured on: lists with gaps, repeated entries, nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

FUNCTIONS = ("page_scores", "attend_selected")


@dataclass(frozen=True)
class Case:
    """q [B,H,T,D], k and v [B,K,S,D], indices [B,K,M]."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 1
    entries: int = 500
    listed: int = 63
    width: int = 64
    value_width: int | None = None
    holes: Literal["none", "some", "all"] = "some"
    softcap: float | None = None

    def __str__(self) -> str:
        shape = (
            f"B{self.batch}-H{self.heads}-K{self.kv_heads}-T{self.tokens}-S{self.entries}-M{self.listed}-D{self.width}"
        )
        marks = [f"Dv{self.value_width}"] * (self.value_width is not None) + ["softcap"] * (self.softcap is not None)
        return "-".join([shape, f"holes:{self.holes}", *marks])


CASES = (
    *(Case(listed=listed, holes=holes) for listed in (0, 1, 63, 400) for holes in ("none", "some", "all")),
    Case(entries=1, listed=40),
    Case(entries=0, listed=5, holes="all"),
    Case(batch=2, heads=6, kv_heads=3, tokens=17, listed=200, width=40),
    Case(heads=7, kv_heads=1, tokens=3, value_width=32, softcap=3.0),
)  # fmt: skip


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `attend_selected`."""
    draw = torch.Generator().manual_seed(seed)
    held = (case.batch, case.kv_heads, case.entries)
    q = torch.randn(case.batch, case.heads, case.tokens, case.width, generator=draw)
    k = torch.randn(*held, case.width, generator=draw)
    v = torch.randn(*held, case.value_width or case.width, generator=draw)
    shape = (case.batch, case.kv_heads, case.listed)
    indices = torch.randint(max(case.entries, 1), shape, generator=draw, dtype=torch.int32)
    hidden = torch.rand(shape, generator=draw) < {"none": 0.0, "some": 0.3, "all": 1.0}[case.holes]
    return {
        **{name: x.to(device, dtype) for name, x in zip("qkv", (q, k, v), strict=True)},
        "indices": indices.masked_fill(hidden, -1).to(device),
        "scale": case.width**-0.5,
        "softcap": case.softcap,
    }
