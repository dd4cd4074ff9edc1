"""H2O: entries that have gathered the most attention so far stay, and the latest ones.

Zhang et al., arXiv 2306.14048, NeurIPS 2023.

    s_j = Σ_i p_ij over all queries so far, of the prompt and of decode steps
    keep the best `heavy`·n of what is not recent, and the last `recent`·n;   memory 2·b·d·L·K·(heavy + recent)·n

n is the prompt's length: the size is settled there and holds from then on, one entry leaving at every step. What has
left has lost its score. Older entries have been seen by more queries, and nothing corrects for it. The published code
scores query heads of models that share no keys; here the group's mean decides for a KV head. Its simulation by masks
hides the entry that leaves the window for one step; neither that nor its one-shot mask from a whole sequence's sums
(which looks ahead) is reproduced. `bulk` is ours: so many entries leave at once, which saves copying.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """heavy, recent: entries that stay by score, and for being the latest; both shares of the prompt, summing to 1
    at most, or both counts. position: original, or reindex for positions counted inside the cache, as the published
    streaming class does. bulk: entries that leave at once."""

    heavy: float = 0.1
    recent: float = 0.1
    position: Literal["original", "reindex"] = "original"
    bulk: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "bulk")
        least, both = min(self.heavy, self.recent), self.heavy + self.recent
        if least < 0 or both == 0 or (both > 1 and 0 < least < 1):
            raise InputError(
                "bad option heavy or recent", got=f"{self.heavy} and {self.recent}",
                expected="two shares that sum to 1 at most, or two counts",
            )  # fmt: skip


def at(budget: float) -> dict[str, Any]:
    return {"heavy": budget / 2, "recent": budget / 2}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.heavy + options.recent, observe="all", reduce="sum", recent=options.recent, when="step",
        slack=options.bulk - 1, position=options.position,
    )  # fmt: skip
    return Decision(keep)
