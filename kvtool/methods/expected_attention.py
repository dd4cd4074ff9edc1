"""Expected Attention: entries that future queries are expected to attend to stay, whatever the question will be.

Devoto et al., arXiv 2510.00636, 2025.

    q ~ N(μ, Σ) before RoPE, per query head;   R the mean rotation of the `future` positions after the prompt
    z_j = exp(μᵀRᵀ k_j / √d + k_jᵀ R Σ Rᵀ k_j / 2d);   a = z / Σ z;   s_j = (a_j + ε) · ‖v_j‖, mean over the group
    keep the first `sink` entries, and the best of the others;   memory 2·b·d·L·K·C for a budget of C entries

`mode=calibrated` takes μ and Σ from a trace (statistic `queries`), so that a prompt's queries need not be kept;
`mode=prompt` from the prompt's own, as the paper does. Formula, order and defaults are those of the peer library's
implementation, by the paper's first authors: the mean rotation stands on both sides of Σ, the norm is ‖v‖₂ (the
paper's is ‖W_O v‖, from memory), ε 0, covariances are divided by n, and the budget is the same for every head; `spread`
deals it out by score instead. Nothing is sure to stay at the prompt's end. Their calibrated form reads 100 texts of
1,000 characters; ours reads whatever was profiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.methods._base import Context, Decision, thinned
from kvtool.options import at_least

STATISTICS = ("queries",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries each KV head keeps of the prompt, a share when at most 1, else a count. mode: whose queries say
    what is to be expected, those of the trace (calibrated) or the prompt's own. future: positions to come. sink: first
    entries that always stay, whose queries do not count. covariance: queries vary, their mean is not all that counts.
    norm: the value's norm counts. epsilon: added to the attention before the norm. spread: over what the budget is
    dealt out by score: head for each its own, layer, or model."""

    budget: float = 0.25
    mode: Literal["calibrated", "prompt"] = "calibrated"
    future: int = 512
    sink: int = 4
    covariance: bool = True
    norm: bool = True
    epsilon: float = 0.0
    spread: Literal["head", "layer", "model"] = "head"

    def __post_init__(self) -> None:
        at_least(1, self, "future")
        at_least(0, self, "sink", "epsilon")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    calibrated = options.mode == "calibrated"
    tables = _law(context) if calibrated else {}
    settings = {"skip": options.sink} | {
        name: getattr(options, name) for name in ("future", "covariance", "norm", "epsilon")
    }
    keep = thinned(
        context, options.budget, score="expected", settings=settings, tables=tables, sink=options.sink,
        observe="last" if calibrated else "all", observed=1, spread=options.spread,
    )  # fmt: skip
    return Decision(keep)


def _law(context: Context) -> dict[str, torch.Tensor]:
    """μ fp32 [L,H,D] and Σ fp32 [L,H,D,D] of the trace."""
    seen = context.seen["queries"]
    mean = seen["sum"] / seen["tokens"]
    covariance = seen["square"] / seen["tokens"] - mean[..., None] * mean[..., None, :]
    return {"mean": mean.float(), "covariance": covariance.float()}
