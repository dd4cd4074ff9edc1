"""Self-speculation: the plan's cache only drafts, and the full cache verifies what it drafts.

Leviathan et al., arXiv 2211.17192; with the model's own compressed cache as the draft: TriForce, Sun et al., arXiv
2404.11912, COLM 2024.

    a round drafts γ tokens over the plan's cache; one pass over the full cache accepts a share of them and adds one
    tokens per pass ≈ (1 − α^(γ+1)) / (1 − α) for an acceptance rate α

This fills the slot `draft` alone: compose it with a plan that says how the drafting cache is compressed. Output is the
full cache's, to rounding: greedy tokens are the same, sampled ones have the same law. Both caches are held, so that
this saves passes over the full cache, never bytes. TriForce's tree of drafts, its second, smaller drafting model and
its fixed choice of chunks are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Draft

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """tokens: drafted a round, γ."""

    tokens: int = 4

    def __post_init__(self) -> None:
        at_least(1, self, "tokens")


def calibrate(context: Context, options: Options) -> Decision:
    return Decision(draft=Draft(options.tokens))
