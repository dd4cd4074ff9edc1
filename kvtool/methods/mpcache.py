"""MPCache, its static part: entries that no late query looks at go once, the same in all heads of a layer.

Zeng et al., arXiv 2501.06807, NeurIPS 2025.

    the last 20 % of the prompt's queries (10 % beyond 24,000 tokens) look;   p_ij mean over heads
    entry j stays iff max_i p_ij ≥ θ of the layer;      memory 2·b·d·K·Σ_l n_l

Thresholds are what is calibrated: the released code has one a task for the whole model (1e-20 to 1e-3, for 15 to 66 %
kept). Here `mode=calibrated` takes for each layer that θ which keeps the share `budget` of the entries of some texts,
and `mode=fixed` takes `threshold` everywhere. With `cap` no layer keeps more than that share of a prompt.

The released code (zwxandy/MPCache, commit 55e401b; card A26) softmaxes logits without 1/√d and without a causal mask,
which makes probabilities extreme: `code=true` does so too, else attention is the model's own. Its thresholds fit no
other form. The dynamic part, which reads pages of what stays, belongs to the slot read. The secure computation that the
method is made for is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share, thinned
from kvtool.methods._filled import filled, scores
from kvtool.methods._prompts import texts
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: share of the entries that a threshold keeps. mode: calibrated thresholds, or one that is given (fixed).
    threshold: of mode=fixed. cap: largest share of a prompt that a layer keeps. observed: share of the prompt's
    queries that look. long, long_observed: the share for prompts of more than so many tokens. code: unscaled logits
    without a causal mask, as released. samples, tokens: texts and their length that mode=calibrated measures."""

    budget: float = 0.25
    mode: Literal["calibrated", "fixed"] = "calibrated"
    threshold: float = 1e-3
    cap: float = 1.0
    observed: float = 0.2
    long: int = 24000
    long_observed: float = 0.1
    code: bool = False
    samples: int = 4
    tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(1, self, "long", "samples", "tokens")
        for name in ("budget", "threshold", "cap", "observed", "long_observed"):
            share(getattr(self, name), name)
        if not self.budget or not self.cap:
            raise InputError("bad option", got=f"budget {self.budget}, cap {self.cap}", expected="shares above 0")
        if not 0 < self.long_observed <= self.observed < 1:
            raise InputError(
                "bad option", got=f"observed {self.observed}, long-observed {self.long_observed}",
                expected="0 < long-observed <= observed < 1",
            )  # fmt: skip


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget, "cap": budget}


def calibrate(context: Context, options: Options) -> Decision:
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
    return Decision(keep(threshold), {"threshold": threshold})


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
