"""StreamingLLM: keep a few first tokens, the attention sinks, and a sliding window.

Xiao et al., arXiv 2309.17453, ICLR 2024.

    every KV head keeps entries 0 … S−1 and the last R (the query's own included); memory 2·b·d·K·L·min(t, S + R)

Positions are counted inside the cache (`position=reindex`, as published): a query never stands further than S + R
from a sink. We reach this by turning the query against the sinks instead of rotating the cached keys at every
step; the two are equal, since attention sees only differences. `position=original` keeps true distances (what
some libraries ship under this name). The trace, if there is one, only adds evidence: the attention mass on the
first tokens. Nothing that left the window can be recalled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.methods._base import Context, Decision, share
from kvtool.slots import Keep

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """sink: first tokens kept. recent: size of the window, in tokens. recent_ratio: window as a share of the prompt, if
    that is more. position: reindex or original."""

    sink: int = 4
    recent: int = 512
    recent_ratio: float = 0.0
    position: Literal["reindex", "original"] = "reindex"


def at(budget: float) -> dict[str, Any]:
    return {"recent": 1, "recent_ratio": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    nothing = torch.zeros(g.layers, g.kv_heads, dtype=torch.bool)
    keep = Keep.heads(
        nothing, sink=options.sink, recent=options.recent, recent_ratio=share(options.recent_ratio, "recent_ratio"),
        position=options.position,
    )  # fmt: skip
    return Decision(keep)
