"""UNComp: KV heads whose queries point in few directions keep less.

Xiong et al., arXiv 2410.03090.

    S: entropy of the spectrum of a head's queries (statistic `query-entropy`), mean over the query heads of a KV head
    each text deals the KV heads of a layer into groups of rising S; votes add up the numbers of a head's groups
    the heads are dealt again by votes; budgets rise in equal steps from low · B in the first group, the mean is B
    s_j = attention of the last w queries, maximum over `kernel` neighbours; the best stay, and the w newest
    at decode steps each head stays at its size, by the attention of the w newest queries;   memory 2·b·d·L·K·B

    stages: E_l the entropy of layer l's hidden states (statistic `state-entropy`); a stage begins where E falls by more
    than `fall` nats; the mean B of a layer falls in equal steps from stage to stage, to late · B in the last one;
    of a prompt's tokens those go on to the next stage that its last w queries attend to most in the layer before, mean
    over heads: their share falls in equal steps too, from all in the first stage to `reach` in the last one

Two groups are published most; of an odd number of heads the upper group is the larger. With low = 0.25 and B = 64 the
budgets are 16 and 112, those of the released script at its smallest; at 512 it has 384 and 768 (low = 0.67), while its
comment says otherwise. It also knows 4, 8 and 32 groups, whose budgets are not known here: the equal steps are ours.
The paper ranks query heads and copies the cache to all of them; here a KV head keeps one set.

Published are stages for 32 layers, as constants, that they begin where E falls by more than 1, and that between stages
tokens are dropped from the prompt's hidden states by the attention of its last queries. How many are dropped, and how
much less later layers hold, is not known here: the equal steps to `reach` and `late` are ours, and so are pooling that
choice as the other one is, and the mean over heads. Without `stages`, the default, all layers have the mean B; with
reach = 1 the prompt is read whole, which saves no time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, odd, per_kv_head, share, thinned
from kvtool.options import at_least
from kvtool.slots import Select
from kvtool.statistics.query_entropy import rising

STATISTICS = ("query-entropy", "state-entropy")
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a KV head keeps in the mean, a share of the prompt when at most 1, else a count. low: budget
    of the heads of lowest entropy, a share of the mean. groups: of heads with one budget, in each layer; as many as
    there are heads at most. window: last queries that score, whose entries always stay. kernel: neighbours that are
    pooled. pool: max, mean or none. decode: evict at every step, or append. stages: layers behind a fall of their
    states' entropy keep less. fall: in nats, what begins a stage. late: budget of the last stage's layers, a share of
    the mean. reach: share of the prompt's tokens that go through the last stage's layers at all, under stages; 1: the
    prompt is read whole."""

    budget: float = 0.25
    low: float = 0.25
    groups: int = 2
    window: int = 8
    kernel: int = 7
    pool: Literal["max", "mean", "none"] = "max"
    decode: Literal["evict", "append"] = "evict"
    stages: bool = False
    fall: float = 1.0
    late: float = 0.5
    reach: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, self, "window")
        at_least(2, self, "groups")
        odd(self.kernel, "kernel")
        share(self.low, "low")
        share(self.late, "late")
        if not 0 < self.reach <= 1 or (self.reach < 1 and not self.stages):
            raise InputError("bad option reach", got=self.reach, expected="a share above 0, and stages=true below 1")
        at_least(0, self, "fall")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.stages else STATISTICS[:1]


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    seen, kv_heads = context.seen["query-entropy"], context.geometry.kv_heads
    texts = seen["sequences"].clamp_min(1)
    entropy = per_kv_head(seen["entropy"] / texts, kv_heads, "mean")
    group = groups(kv_heads, options.groups)  # of each place
    votes = (seen["places"] / texts) @ group.double()
    ranked = votes + 1e-6 * entropy  # which decides between heads with as many votes
    facts: dict[str, Any] = {}
    evidence = {"entropy": (seen["entropy"] / texts).float(), "votes": votes.float()}
    means = [options.budget] * len(ranked)
    if options.stages:
        states = context.seen["state-entropy"]
        evidence["states"] = (states["entropy"] / states["sequences"].clamp_min(1)).float()
        facts["stages"] = stages(evidence["states"].tolist(), options.fall)
        means = falling(options.budget, options.late, facts["stages"], len(ranked))
        facts["reach"] = reaching(options.reach, facts["stages"], len(ranked))
    sizes = group.bincount().tolist()
    by_place = torch.tensor([caps(mean, options.low, sizes) for mean in means])[:, group]
    budget = torch.stack([places[rising(row).argsort()] for row, places in zip(ranked, by_place, strict=True)])
    keep = thinned(
        context, budget, observed=options.window, pool=options.pool, kernel=options.kernel,
        recent=options.window, minimum=options.window, history=options.window if options.decode == "evict" else 0,
        when="step" if options.decode == "evict" else "prefill", decay=0.0,
    )  # fmt: skip
    if options.stages and options.reach < 1:
        keep = replace(keep, onward=onward(facts["reach"], kv_heads, options))
    facts["budgets"] = caps(options.budget, options.low, sizes)
    return Decision(keep, evidence, facts)


def stages(entropy: list[float], fall: float) -> list[int]:
    """The first layer of each stage, by the entropy of each layer's states."""
    return [0, *(layer for layer in range(1, len(entropy)) if entropy[layer - 1] - entropy[layer] > fall)]


def falling(budget: float, late: float, first: list[int], layers: int) -> list[float]:
    """The mean budget of each layer's heads, of stages that begin at these layers: `budget` in the mean."""
    most = 1.0 if budget <= 1 else float("inf")
    sizes = [end - start for start, end in zip(first, [*first[1:], layers], strict=True)]
    each = caps(budget, late, sizes[::-1])[::-1]
    return [min(mean, most) for mean, size in zip(each, sizes, strict=True) for _ in range(size)]


def reaching(reach: float, first: list[int], layers: int) -> list[float]:
    """The share of a prompt's tokens that goes through each layer, of stages that begin at these layers."""
    each = [1 - (1 - reach) * stage / max(1, len(first) - 1) for stage in range(len(first))]
    return [each[sum(layer >= start for start in first) - 1] for layer in range(layers)]


def onward(reach: list[float], kv_heads: int, options: Options) -> Select:
    """Which tokens go on, of so many that reach each layer."""
    budget = torch.tensor(reach)[:, None].expand(-1, kv_heads).clone()
    return Select(
        budget, observed=options.window, recent=options.window, pool=options.pool, kernel=options.kernel, alike=True
    )


def groups(heads: int, count: int) -> torch.Tensor:
    """int64 [K]: the group of each place, both from low to high; groups are as large as one another, or the higher ones
    larger by one."""
    count = min(count, heads)
    return count - 1 - torch.arange(heads).flip(0) * count // heads


def caps(budget: float, low: float, sizes: list[int]) -> list[float]:
    """Budgets of groups of so many heads, from low to high, `budget` in the mean; whole numbers if it is a count. None
    is more than a whole prompt: what is over goes to the others."""
    if len(sizes) == 1:
        return [budget]
    heads, weight = sum(sizes), sum(group * size for group, size in enumerate(sizes))
    first = low * budget if budget <= 1 else float(max(2, round(low * budget)))
    step = heads * (budget - first) / weight
    made = [first + group * step for group in range(len(sizes))]
    if budget > 1:
        return [float(int(each)) for each in made]
    for _ in sizes:  # what is given to a group may take it beyond the whole prompt in turn
        over = sum(size * max(0.0, each - 1) for each, size in zip(made, sizes, strict=True))
        room = sum(size for each, size in zip(made, sizes, strict=True) if each < 1)
        made = [each + over / room if each < 1 else 1.0 for each in made]
    return made
