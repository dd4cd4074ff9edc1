"""EMS: what both the whole prompt and its end find unimportant goes; of the next best, what resembles a kept key joins.

arXiv 2412.08521. Reconstructed: no code was released, and of the paper only the abstract was at hand. Known are a score
of global and local importance, that heads first evict and then merge, and a zero class that lets all heads do so with
the same shapes. The formulas are ours, and results are not those of the published method.

    s_j = L_j / mean(L) + G_j / mean(G)     G: attention by all queries that see j, L: by the last w; mean over a group
    centres      the best `budget` entries and the window's
    candidates   the next best, `candidates` times as many; all others are gone
    each joins the centre of largest cosine, if that is at least `threshold`, else the zero class, which is gone
    keys and values are averaged with weights s; the key is then scaled to its centre's norm

    memory 2·b·d·L·K·budget·n; what is decoded is all kept

The published method goes on merging while it decodes; here the prompt is thinned once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtool.methods._base import Context, Decision, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries each KV head keeps of the prompt, a share when at most 1, else a count. window: last queries of
    the local score, whose entries always stay. candidates: entries that may join, for each that is kept. threshold:
    least cosine of keys that joins; above 1 nothing does. count: an entry that stands for n adds log n to its logit.
    sink: first entries that always stay."""

    budget: float = 0.25
    window: int = 32
    candidates: float = 1.0
    threshold: float = 0.6
    count: bool = False
    sink: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "window")
        at_least(0, self, "sink", "candidates")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.budget, observe="all", score="global-local", recent=options.window, sink=options.sink,
        merge="centres", threshold=options.threshold, count=options.count,
        settings={"window": options.window, "candidates": options.candidates},
    )  # fmt: skip
    return Decision(keep)
