"""Selections that no method makes: every observation, reduction, pool, budget, hook, merge and position policy."""

from __future__ import annotations

from typing import Any

import torch

from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep, Select

CASES: dict[str, dict[str, Any]] = {
    "last": dict(observed=4, recent=2),
    "probes": dict(observe="probes", seed=3),
    "all": dict(observe="all", reduce="sum", sink=1),
    "largest": dict(observe="all", reduce="max", temperature=2.0),
    "variance": dict(observed=5, variance=20.0, pool="mean", kernel=5),
    "pooled-groups": dict(observed=3, pool="max", kernel=3, group="max", group_first=True),
    "grouped-pools": dict(observed=3, pool="max", kernel=3, group="max"),
    "summed": dict(observed=3, pool="mean", kernel=3, group="sum"),
    "alike": dict(observed=4, alike=True, share=(0.3, 0.5, 7.0)),
    "values": dict(score="value-attention", observed=6),
    "counts": dict(score="above-average", observe="all"),
    "norms": dict(score="key-norm", recent=2),
    "less-than-stays": dict(observed=4, sink=3, recent=7, share=(0.2, 0.3, 0.45)),
    "unlike-keys": dict(score="key-difference", sink=1, pool="mean", kernel=3),
    "layer": dict(observed=4, spread="layer", recent=1),
    "floor": dict(observed=4, spread="layer", floor=0.4, sink=1, recent=2),
    "mass": dict(observe="all", reduce="sum", mass=0.8, share=(1.0, 0.5, 0.3)),
    "mass-alike": dict(observed=4, mass=0.6, alike=True),
    "layer-mass": dict(observed=4, mass=0.7, spread="layer", recent=1),
    "least": dict(observed=4, reduce="max", least=0.1, share=(1.0, 0.6, 0.4)),
    "step-sum": dict(observe="all", reduce="sum", when="step", recent=3),
    "step-newest": dict(observed=1, when="step", decay=0.0, sink=1),
    "step-decay": dict(observe="all", when="step", decay=0.7, share=(12.0, 3.0, 0.4)),
    "step-norms": dict(score="key-norm", when="step", recent=1),
    "step-layer": dict(observed=4, when="step", spread="layer", decay=0.0, pool="mean", kernel=3),
    "step-pooled": dict(observed=4, when="step", reduce="max", alike=True),
    "part": dict(observed=0.3, recent=0.2, minimum=6),
    "votes": dict(observed=4, votes=True, alike=True),
    "slope": dict(observed=4, recent=3, spread="slope", settings={"beta": 4, "flat": False}, share=(0.4, 0.4, 0.4)),
    "step-slack": dict(observe="all", when="step", slack=4, recent=0.1),
    "step-share-of-slack": dict(observed=2, when="step", slack=0.3, decay=0.5),
    "step-growing": dict(observe="all", when="step", growing=True, recent=2, share=(0.3, 0.5, 0.7)),
    "step-history": dict(observed=5, history=3, recent=3, when="step", decay=0.0),
    "step-counts": dict(
        score="above-average", reduce="sum", observed=3, history=3, recent=4, when="step", decay=0.0, slack=0.4
    ),
    "step-distance": dict(observe="all", pick="distance", settings={"distance": 5}, sink=2, when="step"),
    "standing": dict(
        observed=4,
        pick="representatives",
        recent=2,
        settings={"share": 0.5, "anchor": "alternate", "spacing": "linspace"},
    ),
    "step-hybrid": dict(
        observe="all",
        score="hybrid",
        alike=True,
        when="step",
        decay=0.8,
        settings={"attention": 0.3, "entropy": 0.3, "gradient": 0.4},
    ),
    "step-growing-mass": dict(observe="all", reduce="sum", alike=True, mass=0.6, when="step", growing=True),
    "per-query": dict(observe="all", reduce="sum", mass=0.7, pick="per-query", alike=True, recent=1),
    "probes-per-query": dict(observe="probes", reduce="sum", pick="per-query", seed=1),
    "chunk": dict(observe="all", reduce="sum", when="chunk", share=(9.0, 6.0, 0.3)),
    "chunk-newest": dict(observed=3, when="chunk", decay=0.0, recent=2, sink=1),
    "merge": dict(observed=4, merge="nearest", recent=1),
    "merge-some": dict(observed=4, merge="nearest", threshold=None, weigh="cosine"),
    "merge-count": dict(observed=4, merge="nearest", threshold=-1.0, weigh="gaussian", count=True),
    "neighbours": dict(observed=4, merge="neighbour", threshold=-1.0, count=True),
    "step-merge": dict(observe="all", when="step", merge="nearest", count=True, threshold=0.3),
    "chunk-merge": dict(observed=4, when="chunk", merge="neighbour", weigh="gaussian", threshold=-1.0, count=True),
    "reindex": dict(observed=4, position="reindex"),
    "step-reindex": dict(observe="all", when="step", recent=3, position="reindex"),
    "gumbel": dict(score="gumbel", observe="all", reduce="sum", temperature=1.5),
    "step-gumbel": dict(score="gumbel", observe="all", reduce="sum", when="step", warming=0.1, recent=2),
    "noise": dict(score="random", recent=1, seed=5),
    "chunk-reindex": dict(observed=4, when="chunk", spread="head", position="reindex", merge="nearest"),
}


NOISY = ["gumbel", "step-gumbel", "noise"]  # the reference does not know the numbers that are drawn


def selecting(model: Model, name: str, **changes: Any) -> Plan:
    """A plan that keeps by one of the cases, of the budgets `share` layer by layer, and 0.4 in further ones."""
    g, options = model.geometry, CASES[name] | changes
    shares = torch.tensor((*options.pop("share", ()), *[0.4] * 4))[: g.layers]
    position = options.pop("position", "original")
    if options.pop("votes", False):  # every other query head, with the weight of two
        options["weights"] = 2.0 * (torch.arange(g.query_heads) % 2).expand(g.layers, -1)
    select = Select(shares[:, None].repeat(1, g.kv_heads), **options)
    everything = torch.ones(g.layers, g.kv_heads)
    return Plan(
        name, model.fingerprint, keep=Keep.heads(everything, sink=0, recent=1, select=select, position=position)
    )
