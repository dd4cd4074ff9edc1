"""The end of a prompt: every lane's entries are scored, budgets are dealt out, and the rest is freed.

    spread "head": each head keeps its own budget;  "layer": the layer's budget goes to the best scores of all its
    heads, and a head's count is mixed with `floor` parts of its own (AdaKV, arXiv 2407.11550);  "model": of all layers

It sees the lanes of all layers at once, or those of one layer whose prompt is over; what one lane does is in
`selector.py`.
"""

from __future__ import annotations

from itertools import chain

import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Step
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.slots import Select

Pairs = list[tuple[Bulk, Step]]


def select(spec: Select, layers: list[SegmentLayer]) -> None:
    """Run the selection in every part of the batch, where it has not been run."""
    for number in range(len(layers[0].parts)):
        groups: list[Pairs] = []
        for layer in layers:
            step = Step(0, layer.scale, layer.softcap)
            lanes = [lane for lane in layer.parts[number].lanes if isinstance(lane, Bulk) and not lane.finished]
            groups.append([(lane, step) for lane in lanes])
        for pairs in [list(chain.from_iterable(groups))] if spec.spread == "model" else groups:
            if pairs:
                _select(spec, pairs)


def _select(spec: Select, pairs: Pairs) -> None:
    selectors = [lane.selector for lane, _ in pairs if lane.selector is not None]
    if spec.when == "chunk":
        for lane, step in pairs:
            lane.evict(step)
            lane.finish()
        return
    scored = [lane.scores(step) for lane, step in pairs]
    if spec.alike:
        mean = torch.cat(scored, dim=1).mean(1, keepdim=True)
        scored = [mean.expand_as(scores) for scores in scored]
    entries = scored[0].shape[2]
    free = selectors[0].free(entries)
    limits = [selector.limits(entries) for selector in selectors]
    if spec.spread != "head":
        flat = dealt(torch.cat([s[0, :, free] for s in scored]), list(chain.from_iterable(limits)), entries, spec.floor)
        limits = [flat[at : at + 1] for at in range(len(flat))]  # lanes of one head each
    for (lane, _), scores, limit in zip(pairs, scored, limits, strict=True):
        count = limit[0]
        if spec.mass:
            count = min(count, covering(scores[0, 0], free, spec.mass))
        if spec.least:
            count = min(count, max(1, entries - int((scores[0, 0, free] < spec.least).sum())))
        lane.thin(scores, count)
        lane.finish()


def dealt(scores: torch.Tensor, limits: list[int], entries: int, floor: float) -> list[int]:
    """scores [R,F] of the F entries, of `entries`, that R heads may drop, and how many entries each would hold by
    itself → how many each holds of the common budget:

        c_h of head h's scores are among the best Σ_h b_h of all;   count_h = [c_h (1 − floor)] + ⌊floor · b_h⌋

    b_h is a head's limit less what always stays; [] rounds half to even, so the sum may miss the budget by a few.
    """
    fixed = entries - scores.shape[1]
    own = [max(0, limit - fixed) for limit in limits]
    if sum(own) >= scores.numel():
        return limits
    order = torch.argsort(scores.flatten().flip(0), descending=True, stable=True)[: sum(own)]
    counts = torch.bincount((scores.numel() - 1 - order) // max(1, scores.shape[1]), minlength=len(limits)).tolist()
    shares = [round(count * (1 - floor)) + int(base * floor) for count, base in zip(counts, own, strict=True)]
    return [max(1, fixed + share) for share in shares]


def covering(scores: torch.Tensor, free: slice, mass: float) -> int:
    """The fewest entries, with all outside `free` among them, that hold this share of the sum of scores [S]."""
    scores = scores.clamp_min(0).double()
    best = scores[free].sort(descending=True).values
    sure = scores.sum() - best.sum()
    held = torch.cat([sure[None], sure + best.cumsum(0)])
    more = int((held < mass * held[-1]).sum())
    return max(1, len(scores) - len(best) + more)
