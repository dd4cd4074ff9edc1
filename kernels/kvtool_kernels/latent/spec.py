"""What `latent` is tested and measured on: ranks, shared and coded latents, both pairings, partly rotated heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool_kernels.quantize.spec import Side, coded

FUNCTIONS = ("attend_latent",)


@dataclass(frozen=True)
class Case:
    """q [B,H,T,D], z [B,K',S,r], v [B,K″,S,Dv]; `rotary` channels turn, all of them where None."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 1
    entries: int = 63
    width: int = 64
    rank: int | None = 32  # None: no basis, the keys themselves
    value_width: int = 48
    rotary: int | None = None
    interleaved: bool = False
    shared: int = 1  # KV heads of a latent
    value_shared: int = 1
    offset: bool = False
    keys: Side | None = None  # how latents are coded
    values: Side | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        shape = f"B{self.batch}-H{self.heads}-K{self.kv_heads}-T{self.tokens}-S{self.entries}-D{self.width}"
        marks = [f"r{self.rank}", f"Dv{self.value_width}"] + [f"R{self.rotary}"] * (self.rotary is not None)
        marks += ["interleaved"] * self.interleaved + ["offset"] * self.offset
        marks += [f"shared{self.shared}x{self.value_shared}"] * (self.shared * self.value_shared > 1)
        marks += [f"{name}-{side}" for name, side in (("k", self.keys), ("v", self.values)) if side is not None]
        return "-".join([shape, *marks, *["softcap"] * (self.softcap is not None)])


CASES = (
    *(Case(entries=entries) for entries in (0, 1, 63, 500)),
    *(Case(rank=rank) for rank in (1, 7, 64, 200)),
    *(Case(rotary=rotary, interleaved=pairs, width=40) for rotary in (0, 10, 40) for pairs in (False, True)),
    Case(batch=2, heads=6, kv_heads=2, tokens=17, entries=100, shared=2, value_shared=2),
    Case(batch=2, heads=9, kv_heads=3, tokens=2, entries=200, rotary=32, shared=3, value_width=128),
    Case(heads=8, kv_heads=4, entries=100, shared=2, value_shared=4, offset=True),
    Case(heads=40, kv_heads=4, entries=100, value_shared=2, offset=True),
    Case(heads=5, kv_heads=1, tokens=3, softcap=5.0),
    *(Case(batch=2, heads=4, rank=None, rotary=rotary, shared=shared) for rotary in (0, 48) for shared in (1, 2)),
    Case(rank=None, offset=True, interleaved=True),
    Case(batch=2, entries=1056, keys=Side(4, "token", 32), values=Side(4, "channel", 16)),
    Case(batch=2, entries=100, rank=30, shared=2, keys=Side(3, "channel", 8), values=Side(2, "channel", 16)),
    Case(rank=None, entries=96, keys=Side(4, "channel", 1, "static"), values=Side(4, "token", 32), value_shared=2),
    Case(tokens=3, entries=96, keys=Side(2, "token", 32), softcap=5.0),
    Case(heads=6, kv_heads=3, rank=None, shared=3, value_shared=3, value_width=192, entries=130,
         keys=Side(3, "channel", 1, "static", 2), values=Side(3, "channel", 192, "levels", 2)),
    Case(batch=2, heads=9, kv_heads=3, shared=3, entries=200, rank=40, keys=Side(4, "channel", 40),
         values=Side(4, "channel", 40), value_width=40, value_shared=3, width=96, rotary=64, interleaved=True),
    Case(heads=8, kv_heads=4, tokens=3, shared=1, value_shared=2, rank=24, width=128, offset=True),
    Case(heads=6, kv_heads=6, shared=2, value_shared=3, rank=24, width=32, interleaved=True, softcap=2.0),
)  # fmt: skip


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `attend_latent`; entries stand in no order, each head's at places of its own."""
    draw = torch.Generator().manual_seed(seed)
    half = (case.width if case.rotary is None else case.rotary) // 2
    reach = 2 * case.entries + 1
    angle = torch.arange(reach)[:, None] * 10_000.0 ** -(torch.arange(half) / max(half, 1))
    kept, across = case.kv_heads // case.shared, case.shared * case.width
    rank = case.rank or across
    held = rank if case.keys is None else -(-rank // 8) * 8  # codes fill up a byte
    q = torch.randn(case.batch, case.heads, case.tokens, case.width, generator=draw)
    z = torch.randn(case.batch, kept, case.entries, held, generator=draw)
    basis = torch.randn(kept, rank, across, generator=draw) * rank**-0.5
    v = torch.randn(case.batch, case.kv_heads // case.value_shared, case.entries, case.value_width, generator=draw)
    offset = torch.randn(kept, across, generator=draw)
    positions = torch.randint(reach, (case.batch, case.kv_heads, case.entries), generator=draw, dtype=torch.int32)
    sides = ((z, case.keys), (v, case.values))
    latents, values = (x.to(device, dtype) if side is None else coded(x.to(device), side) for x, side in sides)
    return {
        "q": q.to(device, dtype),
        "z": latents,
        "basis": None if case.rank is None else basis.to(device, dtype),
        "v": values,
        "positions": positions.to(device),
        "cos": angle.cos().to(device),
        "sin": angle.sin().to(device),
        "scale": case.width**-0.5,
        "offset": offset.to(device) if case.offset else None,
        "interleaved": case.interleaved,
        "softcap": case.softcap,
    }
