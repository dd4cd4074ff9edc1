"""The end of a prompt: every lane's entries are scored, budgets are dealt out, and the rest is freed.

It sees the lanes of all layers at once, or those of one layer whose prompt is over. How a budget is dealt is in
`budgets/`, what one lane does in `selector.py`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch

from kvtool.cache.keep.budgets._base import Ballot, by_layer, covering
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.lane import Step
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.slots import Select

Pairs = list[tuple[Thinned, Step]]


def select(spec: Select, layers: list[SegmentLayer]) -> None:
    """Run the selection in every part of the batch, where it has not been run."""
    for number in range(len(layers[0].parts)):
        groups: list[Pairs] = []
        for layer in layers:
            step = Step(0, layer.scale, layer.softcap)
            lanes = [lane for lane in layer.parts[number].lanes if isinstance(lane, Thinned) and not lane.finished]
            groups.append([(lane, step) for lane in lanes])
        if spec.rule("spread").LEVEL == "model":
            groups = [list(chain.from_iterable(groups))]
        for pairs in groups:
            if pairs:
                _select(spec, pairs)


def _select(spec: Select, pairs: Pairs) -> None:
    if spec.when == "chunk":
        for lane, step in pairs:
            lane.evict(step)
            lane.finish()
        return
    ballots = _ballots(spec, pairs)
    limits = spec.rule("spread").deal(ballots)
    peers = _together(ballots)
    for (lane, _), ballot, limit in zip(pairs, ballots, limits, strict=True):
        lane.thin(ballot.view, ballot.scores, bounded(ballot, limit[0]), peers[ballot.view.layer])
        lane.finish()


def _ballots(spec: Select, pairs: Pairs) -> list[Ballot]:
    found = []
    for lane, step in pairs:
        assert lane.selector is not None
        view = lane.view(step)
        entries, lane.selector.prompt_length = view.k.shape[2], lane.fed  # not all of which may have come here
        found.append(
            Ballot(view, lane.selector.scores(view), lane.selector.limits(lane.fed), lane.selector.free(entries))
        )
    if not spec.alike:
        return found
    mean = {layer: scores.mean(1, keepdim=True) for layer, scores in _together(found).items()}
    return [replace(ballot, scores=mean[ballot.view.layer].expand_as(ballot.scores)) for ballot in found]


def _together(ballots: list[Ballot]) -> dict[int, torch.Tensor]:
    """Scores [B,R,S] of all heads of each layer, lane by lane."""
    return {layer: torch.cat([b.scores for b in group], dim=1) for layer, group in by_layer(ballots).items()}


def bounded(ballot: Ballot, count: int) -> int:
    """At most so many entries, fewer where the scores are concentrated (`Select.mass`) or low (`Select.least`)."""
    spec, scores, entries = ballot.spec, ballot.scores[0, 0], ballot.entries
    if spec.mass:
        count = min(count, covering(scores, ballot.free, spec.mass))
    if spec.least:
        count = min(count, max(1, entries - int((scores[ballot.free] < spec.least).sum())))
    return count
