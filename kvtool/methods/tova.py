"""TOVA: at every step the entry that the newest query looks at least goes, the same one in all heads of a layer.

Oren et al., arXiv 2401.06104, EMNLP 2024.

    s_j = mean over all query heads of the layer of p_tj, t the newest query;   memory 2·b·d·L·K·B

Nothing is accumulated: the newest query alone decides, after the prompt too, where it decides about most of the cache
at once. No entry but the newest is sure to stay, not even the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtool.methods._base import Context, Decision, thinned

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries each layer holds, a share of the prompt when at most 1, else a count."""

    budget: float = 0.25


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    return Decision(thinned(context, options.budget, observed=1, alike=True, recent=1, when="step", decay=0.0))
