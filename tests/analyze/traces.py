"""Traces made by hand, of a model of 3 layers, 4 query heads, 2 KV heads and 8 channels a head."""

from __future__ import annotations

from dataclasses import asdict

import torch

from kvtool import registry
from kvtool.model import Geometry
from kvtool.trace import Trace, statistic

LAYERS, HEADS, KV, WIDTH = 3, 4, 2, 8
CHANNELS = KV * WIDTH
TOKENS = 100.0


def blank(*names: str, layers: int = LAYERS) -> Trace:
    """A trace whose statistics have seen nothing."""
    geometry = Geometry(
        architecture="made by hand",
        layers=layers,
        query_heads=HEADS,
        kv_heads=KV,
        head_dim=WIDTH,
        hidden=32,
        vocabulary=100,
        windows=(None,) * layers,
        rope="",
    )
    trace = Trace({**asdict(geometry), "windows": list(geometry.windows), "weights": ""}, "made by hand")
    trace.statistics = {name: statistic(name)(None, geometry) for name in names}
    return trace


def random(*names: str, layers: int = LAYERS, seed: int = 0) -> Trace:
    """A trace of plausible numbers, seeded; without names of all statistics."""
    trace = blank(*(names or registry.names("statistics")), layers=layers)
    draw = torch.Generator().manual_seed(seed)
    for name, stat in trace.statistics.items():
        for key, zero in stat.state.items():
            values = torch.rand(zero.shape, generator=draw, dtype=torch.float64)
            if name == "gram" and key != "tokens":
                values = values @ values.transpose(-1, -2)
            if stat.rules[key] == "min":
                values = -values
            if key in ("tokens", "rows", "counted", "sequences"):
                values = torch.full_like(values, TOKENS)
            stat[key] = values.to(zero.dtype)
    if "attention" in trace.statistics:
        attention = trace["attention"]
        for key in ("distance", "columns"):
            attention[key] *= TOKENS / attention[key].sum(-1, keepdim=True)
    return trace
