"""What `prefill` is tested and measured on: windows shorter and longer than a block, sinks, chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

FUNCTIONS = ("streaming_prefill",)


@dataclass(frozen=True)
class Case:
    """q [B,H,T,D] from `start` on; k and v [B,K,start + T + beyond,D]."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 63
    width: int = 64
    sink: int = 4
    recent: int = 16
    start: int = 0
    beyond: int = 0
    value_width: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        shape = f"B{self.batch}-H{self.heads}-K{self.kv_heads}-T{self.tokens}-D{self.width}"
        marks = [f"beyond{self.beyond}"] * (self.beyond > 0) + [f"Dv{self.value_width}"] * (
            self.value_width is not None
        )
        marks += ["softcap"] * (self.softcap is not None)
        return "-".join([shape, f"sink{self.sink}-recent{self.recent}-start{self.start}", *marks])


CASES = (
    *(Case(sink=sink, recent=recent) for sink in (0, 4, 63, 100) for recent in (1, 16, 63, 1000)),
    *(Case(tokens=500, sink=sink, recent=recent) for sink, recent in ((4, 64), (130, 33), (0, 128), (1, 499))),
    *(Case(tokens=tokens, start=start, sink=sink) for tokens in (1, 17) for start in (1, 450) for sink in (0, 4)),
    Case(tokens=100, start=500, sink=130, recent=200, batch=2, heads=6, kv_heads=3, width=40),
    Case(tokens=5, sink=0, recent=0),
    Case(tokens=17, start=30, beyond=40),
    Case(tokens=33, heads=3, kv_heads=1, softcap=3.0, value_width=32),
)  # fmt: skip


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `streaming_prefill`."""
    draw = torch.Generator().manual_seed(seed)
    held = (case.batch, case.kv_heads, case.start + case.tokens + case.beyond)
    q = torch.randn(case.batch, case.heads, case.tokens, case.width, generator=draw)
    k = torch.randn(*held, case.width, generator=draw)
    v = torch.randn(*held, case.value_width or case.width, generator=draw)
    return {
        **{name: x.to(device, dtype) for name, x in zip("qkv", (q, k, v), strict=True)},
        "sink": case.sink,
        "recent": case.recent,
        "scale": case.width**-0.5,
        "start": case.start,
        "softcap": case.softcap,
    }
