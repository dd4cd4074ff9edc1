"""MPCache: entries that no late query looks at go once; of what stays, each decode step reads a few pages.

Zeng et al., arXiv 2501.06807, NeurIPS 2025.

    static   the last 20 % of the prompt's queries (10 % beyond 24,000 tokens) look;   p_ij mean over heads
             entry j stays iff max_i p_ij ≥ θ of the layer, in all heads;      memory 2·b·d·K·Σ_l n_l
    dynamic  s(q, page) = Σ_c q_c · (α · max_c + (1 − α) · min_c), over the page's keys
             of the pages of 32 entries the best 50 %;   within these, pages of 16, the best of them, 20 % of all

Thresholds are what is calibrated: the released code has one a task for the whole model (1e-20 to 1e-3, for 15 to 66 %
kept). Here `mode=calibrated` takes for each layer that θ which keeps the share `budget` of the entries of some texts,
and `mode=fixed` takes `threshold` everywhere. With `cap` no layer keeps more than that share of a prompt.

The released code (zwxandy/MPCache, commit 55e401b; card A26) softmaxes logits without 1/√d and without a causal mask,
which makes probabilities extreme: `code=true` does so too, else attention is the model's own. Its thresholds fit no
other form. The secure computation that the method is made for, and which wants a page's score linear, is not here.

The first page is always read, as `sink`, and so is the last upper page until it is full, where that code reads the last
lower page of it. Linear as it is, the score needs one vector a page, not two. The models of the paper have as many KV
heads as query heads: here those of a KV head agree on one choice, by the largest score. With `share`, layers in a row
read what the first of them chooses, which needs layers that hold the same: `part=dynamic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, full_attention, share, thinned
from kvtool.methods._filled import filled, scores
from kvtool.methods._prompts import texts
from kvtool.options import at_least
from kvtool.slots import Keep, Read

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: share of the entries that a threshold keeps. part: static (what is kept), dynamic (what a decode step
    reads), or both. mode: calibrated thresholds, or one that is given (fixed).
    threshold: of mode=fixed. cap: largest share of a prompt that a layer keeps. observed: share of the prompt's
    queries that look. long, long_observed: the share for prompts of more than so many tokens. code: unscaled logits
    without a causal mask, as released. samples, tokens: texts and their length that mode=calibrated measures. upper,
    lower: entries of a page of the first and of the second level. first: share of the upper pages that are looked
    into. second: share of all lower pages that are read. alpha: weight of the maxima. heads: how the query heads of a
    KV head agree, or each for itself. share: layers in a row that read what their first one chooses. sink: entries
    that are always read."""

    budget: float = 0.25
    part: Literal["both", "static", "dynamic"] = "both"
    mode: Literal["calibrated", "fixed"] = "calibrated"
    threshold: float = 1e-3
    cap: float = 1.0
    observed: float = 0.2
    long: int = 24000
    long_observed: float = 0.1
    code: bool = False
    samples: int = 4
    tokens: int = 1024
    upper: int = 32
    lower: int = 16
    first: float = 0.5
    second: float = 0.2
    alpha: float = 0.6
    heads: Literal["max", "mean", "each"] = "max"
    share: int = 1
    sink: int = 16

    def __post_init__(self) -> None:
        at_least(1, self, "long", "samples", "tokens", "upper", "lower", "share")
        at_least(0, self, "sink")
        for name in ("budget", "threshold", "cap", "observed", "long_observed", "first", "second", "alpha"):
            share(getattr(self, name), name)
        above = {name: getattr(self, name) for name in ("budget", "cap", "first", "second")}
        if not all(above.values()):
            raise InputError("bad option", got=above, expected="shares above 0")
        if self.upper % self.lower:
            raise InputError("bad option upper", got=self.upper, expected=f"a multiple of lower, {self.lower}")
        if self.share > 1 and self.part != "dynamic":
            raise InputError(
                "layers that share a choice must hold the same entries", got=f"share {self.share}, part {self.part!r}",
                remedy="set part=dynamic",
            )  # fmt: skip
        if not 0 < self.long_observed <= self.observed < 1:
            raise InputError(
                "bad option", got=f"observed {self.observed}, long-observed {self.long_observed}",
                expected="0 < long-observed <= observed < 1",
            )  # fmt: skip


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget, "cap": budget}


def calibrate(context: Context, options: Options) -> Decision:
    read = None if options.part == "static" else pages(context, options)
    if options.part == "dynamic":
        return Decision(read=read)
    threshold = torch.full((context.geometry.layers,), options.threshold)
    settings = {
        "scaled": not options.code, "causal": not options.code, "long": options.long,
        "long_share": options.long_observed,
    }  # fmt: skip

    def keep(threshold: torch.Tensor) -> Keep:
        return thinned(
            context, options.cap, observed=options.observed, score="joint-attention", reduce="max", alike=True,
            least=float(bool(threshold.any())), settings=settings, tables={"threshold": threshold},
        )  # fmt: skip

    if options.mode == "calibrated":
        threshold = thresholds(context, options, keep(torch.ones_like(threshold)))
    return Decision(keep(threshold), {"threshold": threshold}, read=read)


def pages(context: Context, options: Options) -> Read:
    """What a decode step reads of what is held."""
    layers = context.geometry.layers
    table = torch.full((layers, context.geometry.kv_heads, 1), options.alpha)
    return Read(
        torch.full((layers,), options.second), unit=options.lower, summary="between", table=table, index="pages",
        search={"coarse": options.upper // options.lower, "share": options.first}, heads=options.heads,
        sink=options.sink, owner=None if options.share == 1 else owners(context, options.share),
    )  # fmt: skip


def owners(context: Context, share: int) -> torch.Tensor:
    """int32 [L]: the first of so many layers in a row, counting those that have no window of their own."""
    owner = torch.arange(context.geometry.layers)
    whole = full_attention(context.geometry)[:, 0].nonzero().flatten()
    for first in range(0, len(whole), share):
        owner[whole[first : first + share]] = whole[first]
    return owner.int()


def thresholds(context: Context, options: Options, keep: Keep) -> torch.Tensor:
    """fp32 [L]: what the best `budget` of all texts' entries score in each layer; 0 where nothing is thinned."""
    pooled: list[list[torch.Tensor]] = [[] for _ in range(context.geometry.layers)]
    read = texts(context, samples=options.samples, tokens=options.tokens)
    for cache in filled(context, keep, read, "thresholds"):
        for layer, found in enumerate(scores(cache, keep)):
            pooled[layer] += [] if found is None else [found[0].float().cpu()]
    return torch.stack([_border(torch.cat(each), options.budget) if each else torch.zeros(()) for each in pooled])


def _border(scores: torch.Tensor, kept: float) -> torch.Tensor:
    """The largest θ that at least the share `kept` of scores [N] reaches."""
    return scores.sort(descending=True).values[max(1, round(kept * len(scores))) - 1]
