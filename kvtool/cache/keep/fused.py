"""A decode step that attends, scores and evicts in one operation, for the selections that allow it.

    out, scores, what leaves, its owner = attend_evict(q, k, v, the scores before)      (see the operation's definition)

That is what the stages of `selector.py` come to where queries score by their softmax, at most one entry leaves, and
what leaves is gone or joins one other: nothing is attended to twice, no copy of what stays is made, and the stages'
tensors are not there. Every other step goes through the stages. A scoring rule takes part that has `shift(view)`: what
it adds to the logits of a step's query before the softmax, fp32 [G,S] of each KV head, or nothing; or, where heads go
alike, `blend(view)`: what else the score is a mixture of, and the step's output is its `memory` then; with `PAST`
earlier queries score too, as far as their entries are sure to stay. A picking rule,
that has `among(spec, held, count, free)`: where the lowest score is looked for, if count = held − 1 entries are to
stay. A merging rule that drops at decode steps (`ONCE`), or has `join(k, v, near, spec, memory)`: the last of k, v
[B,K,S,D], which leaves, joins the kept key that is most like its own, `near`, or is gone, in place.

Where the rule that picks is blind, and has `gap(spec, held, count, free)`, the first of the entries that leave, nothing
is scored, and no stage is run either.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.selector import Selector
from kvtool.cache.lane import Partial, Step
from kvtool_kernels.ops import attend_evict
from kvtool_kernels.scoring import Scoring

NONE = torch.zeros(0, dtype=torch.long)


def plain(selector: Selector) -> bool:
    """Do decode steps of this selection do nothing but drop entries, by what they score now and did before?"""
    return not selector.spec.history and _alone(selector) and getattr(selector.merging, "ONCE", False)


def _alone(selector: Selector) -> bool:
    """Does a decode step look at nothing but queries, and at what it held before?"""
    spec = selector.spec
    late = not spec.history or (spec.recent >= spec.history and spec.reduce == "mean" and not spec.variance)
    return spec.when == "step" and late and not (spec.count or selector.needs)


def scores_at_once(selector: Selector) -> bool:
    """Is a decode step of this selection one operation, as long as one entry leaves at most?"""
    spec = selector.spec
    joins = hasattr(selector.merging, "join") and spec.weigh != "gaussian"
    if not (_alone(selector) and (joins or getattr(selector.merging, "ONCE", False))):
        return False
    pooled = spec.pool != "none" and spec.kernel > 1
    smooth = not pooled or not spec.group_first or (spec.pool == "mean" and spec.group != "max")
    known = hasattr(selector.rule, "shift") and smooth and (not spec.history or getattr(selector.rule, "PAST", False))
    if hasattr(selector.rule, "blend"):
        known = spec.alike and not (pooled or spec.warming) and spec.temperature == 1
    return known and hasattr(selector.picking, "among") and spec.weights is None and not selector.blind


def turn(selector: Selector, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int, step: Step) -> Partial:
    """q [B,H,1,D] attends to k, v [B,K,S,D], of which `count` entries, all or all but one, move to the front: they
    stay, the other may join one of them, and the selector is as if the stages had been run."""
    spec, held = selector.spec, k.shape[2]
    low = high = 0
    if count < held:
        where = selector.picking.among(spec, held, count, selector.free(held))
        low, high = (where.start, where.stop) if where.start < where.stop else (0, 1)
    view = selector.seen(q, NONE, k, v, step, {})
    join, blend = getattr(selector.merging, "join", None), getattr(selector.rule, "blend", None)
    scoring = Scoring(
        heat=spec.temperature + spec.warming * selector.turn, noise=() if blend else selector.rule.shift(view),
        past=selector.past(), kernel=1 if spec.pool == "none" else spec.kernel, peak=spec.pool == "max",
        group=spec.group, mix=blend(view) if blend else None, decay=spec.decay, largest=spec.reduce == "max",
        alike=spec.alike,
    )  # fmt: skip
    made, scores, _, near = attend_evict(
        q, k, v, selector.running if selector.remembers else None, scale=step.scale, softcap=step.softcap,
        free=(low, high), scoring=scoring, nearest=join is not None,
    )  # fmt: skip
    if blend is not None:
        selector.memory["output"] = made[0]
    if join is not None and near is not None:
        join(k, v, near, spec, selector.memory)
    selector.passed(scores if selector.remembers else None, q)
    return made


def gap(selector: Selector, held: int, count: int) -> int | None:
    """The first of the held − count entries that leave every head, one behind the other; None if scores say which."""
    if not (selector.blind and selector.turn and hasattr(selector.picking, "gap")):
        return None
    first: int = selector.picking.gap(selector.spec, held, count, selector.free(held))
    return first
