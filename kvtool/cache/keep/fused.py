"""A decode step that attends, scores and evicts in one operation, for the selections that allow it.

    out, scores, what leaves = attend_evict(q, k, v, the scores before)      (see the operation's definition)

That is what the stages of `selector.py` come to where one query scores by its softmax, at most one entry leaves, and
what leaves is gone: nothing is attended to twice, no copy of what stays is made, and the stages' tensors are not there.
Every other step goes through the stages. A scoring rule takes part that has `shift(view)`: what it adds to the logits
of a step's query before the softmax, fp32 [G,S] of each KV head, or nothing; and a picking rule that has
`among(spec, held, count, free)`: where the lowest score is looked for, if count = held − 1 entries are to stay.

Where the rule that picks is blind, and has `gap(spec, held, count, free)`, the first of the entries that leave, nothing
is scored, and no stage is run either.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.selector import Selector
from kvtool.cache.lane import Partial, Step
from kvtool_kernels.ops import attend_evict

NONE = torch.zeros(0, dtype=torch.long)


def plain(selector: Selector) -> bool:
    """Do decode steps of this selection do nothing but drop entries, by what they score now and did before?"""
    spec = selector.spec
    merges = spec.count or not getattr(selector.merging, "ONCE", False)
    return spec.when == "step" and not (merges or spec.history or selector.needs)


def scores_at_once(selector: Selector) -> bool:
    """Is a decode step of this selection, which is plain, one operation, as long as one entry leaves at most?"""
    spec = selector.spec
    pooled = spec.pool != "none" and spec.kernel > 1
    smooth = not pooled or (spec.pool == "mean" and (spec.group != "max" or not spec.group_first))
    known = hasattr(selector.rule, "shift") and hasattr(selector.picking, "among")
    return known and smooth and spec.weights is None and not selector.blind


def turn(selector: Selector, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int, step: Step) -> Partial:
    """q [B,H,1,D] attends to k, v [B,K,S,D], of which `count` entries, all or all but one, move to the front: they
    stay, and the selector is as if the stages had been run."""
    spec, held = selector.spec, k.shape[2]
    low = high = 0
    if count < held:
        where = selector.picking.among(spec, held, count, selector.free(held))
        low, high = (where.start, where.stop) if where.start < where.stop else (0, 1)
    view = selector.seen(q, NONE, k, v, step, {})
    made, scores, _ = attend_evict(
        q, k, v, selector.running if selector.remembers else None, scale=step.scale, free=(low, high),
        softcap=step.softcap, heat=spec.temperature + spec.warming * selector.turn, noise=selector.rule.shift(view),
        group=spec.group, kernel=1 if spec.pool == "none" else spec.kernel, decay=spec.decay,
        largest=spec.reduce == "max", alike=spec.alike,
    )  # fmt: skip
    selector.passed(scores if selector.remembers else None)
    return made


def gap(selector: Selector, held: int, count: int) -> int | None:
    """The first of the held − count entries that leave every head, one behind the other; None if scores say which."""
    if not (selector.blind and selector.turn and hasattr(selector.picking, "gap")):
        return None
    first: int = selector.picking.gap(selector.spec, held, count, selector.free(held))
    return first
