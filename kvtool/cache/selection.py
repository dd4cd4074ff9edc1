"""The end of a prompt: every lane's entries are scored, budgets are dealt out, and the rest is freed.

    spread "head": each head keeps its own budget;  "layer": the layer's budget goes to the best scores of all its
    heads, after a `floor` share of each head's own (AdaKV, arXiv 2407.11550, algorithm 1);  "model": over all layers

It sees the lanes of all layers at once; what one lane does is in `selector.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Step
from kvtool.slots import Select

if TYPE_CHECKING:
    from kvtool.cache.segment_cache import SegmentLayer


def select(spec: Select, layers: list[SegmentLayer]) -> None:
    """Run the selection in every part of the batch."""
    for number in range(len(layers[0].parts)):
        chosen = [
            (
                layer,
                [lane for lane in layer.parts[number].lanes if isinstance(lane, Bulk) and lane.selector is not None],
            )
            for layer in layers
        ]
        groups = [lanes for _, lanes in chosen] if spec.spread != "model" else [[x for _, ls in chosen for x in ls]]
        steps = {id(lane): Step(0, layer.scale, layer.softcap) for layer, lanes in chosen for lane in lanes}
        for lanes in groups:
            _select(spec, lanes, steps)


def _select(spec: Select, lanes: list[Bulk], steps: dict[int, Step]) -> None:
    scored = []
    for lane in lanes:
        assert lane.selector is not None
        k, v, _ = lane.recall()
        scored.append(lane.selector.scores(k, v, steps[id(lane)]))
    counts = [
        lane.selector.counts(s.shape[2]) for lane, s in zip(lanes, scored, strict=True) if lane.selector is not None
    ]
    if spec.spread != "head" and lanes:
        rows = torch.cat([s[0] for s in scored])
        flat = dealt(rows, [count for lane in counts for count in lane], spec.floor)
        counts = [flat[at : at + 1] for at in range(len(flat))]  # lanes of one head each
    for lane, scores, count in zip(lanes, scored, counts, strict=True):
        if spec.mass:
            count = [min(c, covering(scores[0, head], spec.mass)) for head, c in enumerate(count)]
        assert len(set(count)) == 1
        lane.thin(scores, count[0])
        lane.finish()


def dealt(scores: torch.Tensor, counts: list[int], floor: float) -> list[int]:
    """scores [R,S] of R heads, and what each would keep by itself → what each keeps of the common budget."""
    sure = [min(int(floor * count), scores.shape[1]) for count in counts]
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    rest = scores.clone()
    for row, count in enumerate(sure):
        rest[row, order[row, :count]] = float("-inf")
    best = torch.topk(rest.flatten(), sum(counts) - sum(sure)).indices
    extra = torch.bincount(best // scores.shape[1], minlength=len(counts))
    return [max(1, count) for count in (torch.tensor(sure) + extra.cpu()).tolist()]


def covering(scores: torch.Tensor, mass: float) -> int:
    """The fewest entries of scores [S] that hold this share of the sum; entries at +inf are all among them."""
    fixed = int(scores.isposinf().sum())
    free = scores[~scores.isposinf()].clamp_min(0).sort(descending=True).values.double().cumsum(0)
    if not len(free) or free[-1] <= 0:
        return max(1, fixed)
    return max(1, fixed + int((free < mass * free[-1]).sum()) + 1)
