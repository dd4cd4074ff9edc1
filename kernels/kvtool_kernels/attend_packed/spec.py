"""What `attend_packed` is tested and measured on: the layouts of published methods, all bits, odd shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvtool_kernels.quantize.spec import Side, coded

KIVI = (Side(4, "token", 32), Side(4, "channel", 32))


@dataclass(frozen=True)
class Case:
    """q [B,H,T,D] over S entries; a side that is None stays dense."""

    keys: Side | None = KIVI[0]
    values: Side | None = KIVI[1]
    batch: int = 1
    heads: int = 6
    kv_heads: int = 2
    tokens: int = 1
    entries: int = 512
    width: int = 64
    value_width: int | None = None
    softcap: float | None = None
    size: float = 1.0  # standard deviation of the logits

    def __str__(self) -> str:
        sides = [f"{name}-{side or 'dense'}" for name, side in (("k", self.keys), ("v", self.values))]
        shape = f"B{self.batch}-H{self.heads}-K{self.kv_heads}-T{self.tokens}-S{self.entries}-D{self.width}"
        marks = [f"Dv{self.value_width}"] * (self.value_width is not None) + ["softcap"] * (self.softcap is not None)
        return "-".join([*sides, shape, *marks] + [f"x{self.size:g}"] * (self.size != 1))


def kivi(bits: int, group: int = 32, **shape: Any) -> Case:
    """Keys per channel, values per token."""
    return Case(Side(bits, "token", group), Side(bits, "channel", group), **shape)


CASES = (
    *(kivi(bits) for bits in range(1, 9)),
    *(Case(Side(bits, "channel", 32), Side(bits, "token", 32)) for bits in range(1, 9)),
    *(kivi(4, entries=entries) for entries in (0, 32, 64, 992, 2080)),
    *(
        Case(Side(4, "channel", 32), Side(2, "channel", 16), entries=entries, batch=2)
        for entries in (0, 1, 63, 500, 1000)
    ),
    *(Case(Side(2, "token", group), Side(2, "channel", 8), entries=384) for group in (8, 16, 64, 128)),
    *(Case(Side(2, keys, 32), Side(2, "token", 128), entries=384) for keys in ("channel", "token")),
    *(kivi(2, batch=3, heads=heads, kv_heads=kv_heads, entries=96) for heads, kv_heads in ((4, 4), (7, 1), (16, 2))),
    *(kivi(4, tokens=tokens, batch=2) for tokens in (2, 5, 17)),
    *(kivi(4, width=width, value_width=value_width) for width, value_width in ((128, 64), (40, 96), (64, 32))),
    kivi(4, softcap=3.0, size=5.0),
    kivi(4, softcap=3.0, size=5.0, tokens=17, entries=96),
    *(kivi(4, size=size) for size in (0.0, 100.0, 1e4)),
    *(replace(case, keys=None) for case in (kivi(4), kivi(2, tokens=5, batch=2))),
    *(replace(case, values=None) for case in (kivi(4), kivi(2, tokens=5, batch=2))),
    Case(None, None, entries=63),
    *(Case(Side(bits, "token", 32, "levels"), Side(bits, "channel", 32, "levels")) for bits in (2, 3, 4)),
    Case(Side(4, "token", 32, "symmetric"), Side(4, "channel", 64, "symmetric")),
    Case(Side(4, "channel", 1, "static"), Side(4, "channel", 32, "static"), entries=500, batch=2),
    Case(Side(4, "channel", 1, "static", 2), Side(4, "channel", 64, "levels", 2), entries=500, batch=2),
    *(Case(Side(bits, "channel", 40), Side(bits, "channel", 8), width=40, entries=100) for bits in (1, 3, 4, 7)),
    Case(Side(3, "channel", 48, "levels", 1), Side(3, "channel", 1, "static", 1), width=48, entries=100),
    Case(Side(3, "token", 32, outliers=1), Side(5, "channel", 16, "levels", 3), tokens=5, entries=96),
)  # fmt: skip


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `attend_packed`. Some channels of the keys are large, as real ones are."""
    draw = torch.Generator().manual_seed(seed)
    group_shape = (case.batch, case.kv_heads, case.entries)
    q = torch.randn(case.batch, case.heads, case.tokens, case.width, generator=draw) * case.size
    k = torch.randn(*group_shape, case.width, generator=draw) + 3.0 * (torch.arange(case.width) % 13 == 5)
    v = torch.randn(*group_shape, case.value_width or case.width, generator=draw)
    sides = {
        name: _side(x, side, dtype, device) for name, x, side in (("keys", k, case.keys), ("values", v, case.values))
    }
    return {"q": q.to(device, dtype), **sides, "scale": case.width**-0.5, "softcap": case.softcap}


def _side(x: torch.Tensor, side: Side | None, dtype: torch.dtype, device: str) -> Any:
    return x.to(device, dtype) if side is None else coded(x.to(device), side)
