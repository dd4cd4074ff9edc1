"""The best entry of every run of similar keys; as many runs as entries shall stay (see `cache/keep/runs.py`).

Heavy hitters, [settings["heavy"] · count] of the best, are runs by themselves. (KVMerger: arXiv 2407.08454.)
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks._base import Choice
from kvtool.cache.keep.runs import links, pivots, runs, sole

RAGGED = False


def pick(choice: Choice) -> torch.Tensor:
    return picked(choice, None)


def picked(choice: Choice, epsilon: torch.Tensor | None) -> torch.Tensor:
    """As `pick`; epsilon [K] may leave fewer runs. The merging rule is told each entry's run."""
    spec, scores = choice.view.spec, choice.scores
    alone = sole(scores, choice.count, choice.free, float(spec.settings["heavy"]))
    run = runs(links(choice.view.k, alone), choice.count, epsilon)
    if spec.merge == "runs":
        choice.view.memory["run"] = run
    return pivots(run, scores)
