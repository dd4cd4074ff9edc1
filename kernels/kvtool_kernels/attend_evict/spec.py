"""What `attend_evict` is tested and measured on: every way to score, sizes that no vector divides, and no eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool_kernels.mixing import Mix
from kvtool_kernels.scoring import Scoring


@dataclass(frozen=True)
class Case:
    """q [B,H,1,D], k and v [B,K,S,D] in buffers with `room` more; `known` entries have a score from before, −1: none
    has. The others are options of the operation; `noisy` adds noise, `mixed` a mixture of scores, which knows what the
    step before made if it `moved`; `past` earlier queries score too."""

    batch: int = 1
    heads: int = 6
    kv_heads: int = 2
    entries: int = 500
    width: int = 64
    room: int = 0
    known: int = -1
    low: int = 0
    recent: int = 1
    softcap: float | None = None
    heat: float = 1.0
    noisy: bool = False
    group: str = "mean"
    kernel: int = 1
    decay: float = 1.0
    largest: bool = False
    alike: bool = False
    nearest: bool = False
    mixed: bool = False
    moved: bool = True
    past: int = 0
    peak: bool = False
    size: float = 1.0  # standard deviation of the logits

    def __str__(self) -> str:
        plain = Case()
        return "-".join(f"{name}{value}" for name, value in vars(self).items() if value != getattr(plain, name)) or "-"


CASES = (
    *(Case(entries=entries) for entries in (2, 63, 257, 1000)),
    *(Case(group=group) for group in ("sum", "max")),
    Case(alike=True, room=3),
    Case(batch=2, alike=True, entries=301),
    Case(known=499, low=4, recent=100, group="sum", room=1),
    Case(known=490, decay=0.7, batch=2),
    Case(known=499, decay=0.9, largest=True),
    Case(kernel=15, entries=301, low=2, recent=32),
    Case(kernel=5, group="max", alike=True),
    Case(heat=1.7, noisy=True, known=499, group="sum"),
    Case(heat=0.5, batch=2, heads=8),
    Case(noisy=True, heads=15, kv_heads=3, entries=333),
    Case(heads=10, kv_heads=1, width=128),
    Case(heads=18, kv_heads=2, width=32),
    Case(heads=20, kv_heads=1),
    Case(width=40, heads=2),
    Case(softcap=3.0, size=5.0),
    Case(recent=500, known=400),
    *(Case(entries=entries, nearest=True) for entries in (2, 40, 257)),
    Case(known=499, recent=250, batch=2, nearest=True, room=5),
    Case(heads=10, kv_heads=5, width=128, alike=True, nearest=True),
    *(Case(entries=entries, past=7, recent=8, kernel=7, peak=True) for entries in (8, 60, 500, 333)),
    Case(batch=2, past=3, recent=4, group="max", known=499, decay=0.5, heads=15, kv_heads=3),
    Case(kernel=5, group="max", heads=10, kv_heads=1, width=128),
    Case(kernel=3, peak=True, group="sum", heat=1.5, noisy=True),
    Case(past=1, recent=2, heat=0.7, alike=True, kernel=3, low=5),
    Case(past=9, recent=10, softcap=2.0, size=3.0, nearest=True),
    *(Case(entries=entries, alike=True, mixed=True) for entries in (1, 2, 40, 257)),
    Case(known=499, decay=0.9, alike=True, mixed=True, batch=2, room=7),
    Case(kv_heads=3, heads=9, known=400, largest=True, alike=True, mixed=True, moved=False),
    Case(heads=15, kv_heads=3, width=128, entries=333, low=4, recent=50, alike=True, mixed=True),
    Case(softcap=3.0, size=5.0, alike=True, mixed=True),
    Case(size=4.0, alike=True, mixed=True, nearest=True),
    Case(size=100.0),
    Case(size=0.0, low=7),
)


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `attend_evict`."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(case.batch, case.heads, 1, case.width, generator=draw) * case.size
    shape = (case.batch, case.kv_heads, case.entries + case.room, case.width)
    k, v = (torch.randn(*shape, generator=draw).to(device, dtype) for _ in range(2))
    k[:, :, case.entries :] = v[:, :, case.entries :] = float("nan")
    before = None if case.known < 0 else torch.rand(case.batch, case.kv_heads, case.known, generator=draw).to(device)
    group = case.heads // case.kv_heads
    noise = [torch.randn(group, case.entries + 5, generator=draw).to(device)[:, 2:-3] for _ in range(case.kv_heads)]
    made = torch.randn(q.shape, generator=draw).to(device, dtype) if case.mixed and case.moved else None
    queries = torch.randn(case.batch, case.heads, case.past, case.width, generator=draw) * case.size
    past = queries.to(device, dtype) if case.past else None
    scoring = Scoring(
        heat=case.heat, noise=noise if case.noisy else (), past=past, kernel=case.kernel, peak=case.peak,
        group=case.group, mix=Mix(0.5, 0.2, 0.3, made) if case.mixed else None, decay=case.decay, largest=case.largest,
        alike=case.alike,
    )  # fmt: skip
    return {
        "q": q.to(device, dtype), "k": k[:, :, : case.entries], "v": v[:, :, : case.entries], "before": before,
        "scale": case.width**-0.5, "free": (case.low, max(case.low, case.entries - case.recent)),
        "softcap": case.softcap, "scoring": scoring, "nearest": case.nearest,
    }  # fmt: skip
