"""What `attend` is tested and measured on: shapes that real caches have, and hostile ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool_kernels.bias import hiding


@dataclass(frozen=True)
class Case:
    """q [B,H,T,D], k and v [B,K,S,D]. `hide` adds a bias over left padding, random entries, rows, or everything."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 1
    entries: int = 63
    width: int = 64
    causal: bool = False
    hide: Literal["nothing", "padding", "entries", "entries-by-head", "rows", "everything"] = "nothing"
    softcap: float | None = None
    size: float = 1.0  # standard deviation of the logits
    value_width: int | None = None  # where values are narrower than keys

    def __str__(self) -> str:
        marks = (
            [self.hide] * (self.hide != "nothing") + ["causal"] * self.causal + ["softcap"] * (self.softcap is not None)
        )
        marks += [f"x{self.size:g}"] * (self.size != 1) + [f"Dv{self.value_width}"] * (self.value_width is not None)
        shape = f"B{self.batch}-H{self.heads}-K{self.kv_heads}-T{self.tokens}-S{self.entries}-D{self.width}"
        return "-".join([shape, *marks])


CASES = (
    *(Case(entries=entries) for entries in (0, 1, 63, 500, 1000)),
    *(Case(tokens=63, entries=entries, causal=causal) for entries in (63, 500) for causal in (False, True)),
    Case(tokens=1, entries=1, causal=True),
    Case(tokens=500, entries=1000, causal=True),
    Case(tokens=7, entries=0),
    Case(heads=6, kv_heads=6, tokens=5, entries=63, causal=True),
    Case(heads=6, kv_heads=1, tokens=1, entries=500),
    Case(heads=9, kv_heads=3, tokens=63, entries=63, width=40, causal=True),
    *(
        Case(batch=3, tokens=tokens, entries=500, hide=hide)
        for tokens in (1, 17)
        for hide in ("padding", "entries", "entries-by-head", "rows", "everything")
    ),
    Case(batch=2, tokens=33, entries=63, causal=True, hide="padding"),
    Case(batch=2, tokens=33, entries=63, causal=True, hide="rows"),
    Case(tokens=5, entries=63, softcap=3.0, size=5.0),
    Case(tokens=33, entries=63, causal=True, softcap=3.0, size=5.0, batch=2, hide="padding"),
    Case(tokens=5, entries=500, size=100.0),
    Case(tokens=63, entries=63, causal=True, size=100.0),
    Case(tokens=5, entries=500, size=0.0),
    Case(tokens=1, entries=500, size=1e4),
    Case(tokens=5, entries=63, value_width=32),
)  # fmt: skip


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `attend`."""
    draw = torch.Generator().manual_seed(seed)
    group_shape = (case.batch, case.kv_heads, case.entries)
    q = torch.randn(case.batch, case.heads, case.tokens, case.width, generator=draw) * case.size
    k = torch.randn(*group_shape, case.width, generator=draw)
    v = torch.randn(*group_shape, case.value_width or case.width, generator=draw)
    return {
        **{name: tensor.to(device, dtype) for name, tensor in zip("qkv", (q, k, v), strict=True)},
        "scale": case.width**-0.5,
        "causal": case.causal,
        "bias": _bias(case, draw, device),
        "softcap": case.softcap,
    }


def _bias(case: Case, draw: torch.Generator, device: str) -> torch.Tensor | None:
    full = (case.batch, case.heads, case.tokens, case.entries)
    hidden = {
        "nothing": lambda: None,
        "padding": lambda: (torch.arange(case.entries) < 11 * torch.arange(case.batch)[:, None])[:, None, None],
        "entries": lambda: torch.rand(case.batch, 1, *full[2:], generator=draw) < 0.5,
        "entries-by-head": lambda: torch.rand(full, generator=draw) < 0.5,
        "rows": lambda: (torch.arange(case.tokens) % 2 == 0)[None, None, :, None].expand(case.batch, 1, *full[2:]),
        "everything": lambda: torch.ones(case.batch, 1, 1, case.entries, dtype=torch.bool),
    }[case.hide]()
    if hidden is None:
        return None
    return hiding(hidden).to(device)
