"""What `quantize` and its inverse are tested and measured on: layouts, groups, bits; constant, zero, huge values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.quantize.reference import quantize, quantize_levels

FUNCTIONS = ("quantize", "quantize_levels", "dequantize")
Code = Literal["affine", "symmetric", "static", "levels"]


@dataclass(frozen=True)
class Side:
    """How one side is coded. "symmetric" has no zero; "static" one range for all entries; "levels" a table."""

    bits: int = 4
    layout: Layout = "token"
    group: int = 32
    code: Code = "affine"
    outliers: int = 0  # of an entry

    def __str__(self) -> str:
        marks = f"-{self.code}" * (self.code != "affine") + f"-{self.outliers}apart" * (self.outliers > 0)
        return f"{self.bits}b-{self.layout}-g{self.group}{marks}"


@dataclass(frozen=True)
class Case:
    """x [B,K,S,D] of one kind of values, and its code."""

    side: Side = Side()
    batch: int = 2
    kv_heads: int = 3
    entries: int = 64
    width: int = 64
    values: Literal["normal", "outliers", "constant", "zero", "huge", "beyond-fp16", "tiny"] = "normal"

    def __str__(self) -> str:
        shape = f"B{self.batch}-K{self.kv_heads}-S{self.entries}-D{self.width}"
        return "-".join([str(self.side), shape, *[self.values] * (self.values != "normal")])


CASES = (
    *(Case(Side(bits, layout)) for bits in range(1, 9) for layout in ("token", "channel")),
    *(Case(Side(3, "token", group), entries=384) for group in (8, 16, 64, 128)),
    *(Case(Side(3, "channel", group), entries=63) for group in (1, 8, 16, 64)),
    *(
        Case(Side(2, layout), values=values)
        for layout in ("token", "channel")
        for values in ("outliers", "constant", "zero", "huge", "beyond-fp16", "tiny")
    ),
    *(Case(Side(bits, layout, 32, "levels")) for bits in (2, 3, 4) for layout in ("token", "channel")),
    *(Case(Side(4, layout, 32, "symmetric")) for layout in ("token", "channel")),
    Case(Side(4, "channel", 1, "static"), entries=63),
    Case(Side(4, "channel", 32, "static"), entries=500),
    *(Case(Side(4, layout), entries=0) for layout in ("token", "channel")),
    *(Case(Side(4, layout, 32, code, 3)) for layout in ("token", "channel") for code in ("affine", "levels")),
    *(Case(Side(bits, "channel", group), width=24) for bits in (1, 3, 4, 8) for group in (1, 8, 24)),
    Case(Side(3, "channel", 192, "levels", 2), width=192),
    Case(Side(5, "channel", 8), entries=1, width=40, batch=1, kv_heads=1),
    Case(Side(6, "token", 32), entries=32, width=40),
)  # fmt: skip


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """x [B,K,S,D]."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(case.batch, case.kv_heads, case.entries, case.width, generator=draw)
    x = {
        "normal": lambda: x,
        "outliers": lambda: x * torch.where(torch.arange(case.width) % 17 == 3, 50.0, 1.0),
        "constant": lambda: torch.full_like(x, 2.7),
        "zero": lambda: torch.zeros_like(x),
        "huge": lambda: x.clamp(-1, 1) * 6e4,
        "beyond-fp16": lambda: x * 1e6,
        "tiny": lambda: x * 1e-9,
    }[case.values]()
    return x.to(device, dtype)


def coded(x: torch.Tensor, side: Side) -> Packed:
    """x [B,K,S,D] in the code of `side`, by the definition."""
    if side.outliers:
        index = x.float().abs().topk(side.outliers, dim=-1).indices
        return replace(
            coded(x, replace(side, outliers=0)), outliers=(index.to(torch.int16), x.gather(-1, index).half())
        )
    if side.code == "affine":
        return quantize(x, bits=side.bits, group=side.group, layout=side.layout)
    batch, heads, tokens, width = x.shape
    per_group = side.code != "static" and side.layout == "token"
    static = (1, heads, 1, width // side.group)
    fitting = (batch, heads, tokens, width // side.group)
    shape = (batch, heads, tokens // side.group, width) if per_group else static if side.code == "static" else fitting
    draw = torch.Generator().manual_seed(1)
    scale = (torch.rand(shape, generator=draw, dtype=torch.float32) + 0.5).to(x.device, torch.float16)
    zero = None if side.code == "symmetric" else (scale * 0.1).to(torch.float16)
    marks = torch.linspace(-3, 3, 2**side.bits, dtype=torch.float32, device=x.device)
    levels = marks if side.code == "symmetric" else marks * marks.abs()  # the second unevenly spaced
    return quantize_levels(
        x, levels=levels, scale=scale, zero=zero, bits=side.bits, group=side.group, layout=side.layout
    )
