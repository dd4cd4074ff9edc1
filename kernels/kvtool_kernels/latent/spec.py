"""What `latent` is tested and measured on: ranks, shared latents, both pairings, partly rotated heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

FUNCTIONS = ("attend_latent",)


@dataclass(frozen=True)
class Case:
    """q [B,H,T,D], z [B,K|1,S,r], v [B,K|1,S,Dv]; `rotary` channels turn, all of them where None."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 1
    entries: int = 63
    width: int = 64
    rank: int = 32
    value_width: int = 48
    rotary: int | None = None
    interleaved: bool = False
    shared: bool = False  # one latent for all KV heads
    softcap: float | None = None

    def __str__(self) -> str:
        shape = (
            f"B{self.batch}-H{self.heads}-K{self.kv_heads}-T{self.tokens}-S{self.entries}-D{self.width}-r{self.rank}"
        )
        marks = [f"Dv{self.value_width}"] + [f"R{self.rotary}"] * (self.rotary is not None)
        marks += (
            ["interleaved"] * self.interleaved + ["shared"] * self.shared + ["softcap"] * (self.softcap is not None)
        )
        return "-".join([shape, *marks])


CASES = (
    *(Case(entries=entries) for entries in (0, 1, 63, 500)),
    *(Case(rank=rank) for rank in (1, 7, 64, 200)),
    *(Case(rotary=rotary, interleaved=pairs, width=40) for rotary in (0, 10, 40) for pairs in (False, True)),
    Case(batch=2, heads=6, kv_heads=2, tokens=17, entries=100, shared=True),
    Case(batch=2, heads=9, kv_heads=3, tokens=2, entries=200, rotary=32, shared=True, value_width=128),
    Case(heads=5, kv_heads=1, tokens=3, softcap=5.0),
)  # fmt: skip


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `attend_latent`; entries stand in no order, each head's at places of its own."""
    draw = torch.Generator().manual_seed(seed)
    kept = 1 if case.shared else case.kv_heads
    half = (case.width if case.rotary is None else case.rotary) // 2
    reach = 2 * case.entries + 1
    angle = torch.arange(reach)[:, None] * 10_000.0 ** -(torch.arange(half) / max(half, 1))
    q = torch.randn(case.batch, case.heads, case.tokens, case.width, generator=draw)
    z = torch.randn(case.batch, kept, case.entries, case.rank, generator=draw)
    basis = torch.randn(case.kv_heads, case.rank, case.width, generator=draw) * case.rank**-0.5
    v = torch.randn(case.batch, kept, case.entries, case.value_width, generator=draw)
    positions = torch.randint(reach, (case.batch, case.kv_heads, case.entries), generator=draw, dtype=torch.int32)
    return {
        **{name: x.to(device, dtype) for name, x in zip(("q", "z", "basis", "v"), (q, z, basis, v), strict=True)},
        "positions": positions.to(device),
        "cos": angle.cos().to(device),
        "sin": angle.sin().to(device),
        "scale": case.width**-0.5,
        "interleaved": case.interleaved,
        "softcap": case.softcap,
    }
