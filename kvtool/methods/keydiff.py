"""KeyDiff: keys that differ most from the mean direction of all keys stay; no query is looked at.

Park et al., arXiv 2504.15364.

    s_j = −cos(k_j, mean_i k_i / ‖k_i‖)      keys after RoPE;   memory 2·b·d·L·K·B

Since no query is needed, a prompt can be compressed chunk by chunk, and the question may come later. `when` says
whether entries go once, after the prompt; after every chunk of it, so that prefill stays within the budget and a chunk;
or at every decode step too. There are no sinks and no window unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.methods._base import Context, Decision, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries each KV head keeps of the prompt, a share when at most 1, else a count. when: prefill, chunk or
    step. sink, recent: first and latest entries that always stay."""

    budget: float = 0.25
    when: Literal["prefill", "chunk", "step"] = "prefill"
    sink: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        at_least(0, self, "sink", "recent")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.budget, score="key-difference", when=options.when, sink=options.sink, recent=options.recent
    )
    return Decision(keep)
