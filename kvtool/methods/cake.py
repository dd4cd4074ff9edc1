"""CAKE: layers whose attention is spread out and shifting keep more, and so do entries whose attention shifts.

Qin et al., arXiv 2503.12491, ICLR 2025.

    H, V: entropy of the last w queries' attention over the rest of the prompt, and its variance over these queries
    layer l keeps w + (B − w)·L · p_l / Σ p,   p_l = H_l^{1/τ1} · V_l^{1/τ2}
    s_j = mean + γ · variance, over the last w queries, of their attention to j; averaged over `kernel` neighbours
    at decode steps, when more is held: s_j of the newest query alone, without memory; the w newest always stay
    memory 2·b·d·L·K·B

`mode=prompt` deals out the budget by each prompt's own H and V, as published; `mode=calibrated` by the share of a
prompt that the same rule gives each layer on `samples` prompts in the mean, so that it is known before a prompt comes.
τ1 and τ2 are tuned per model and budget in the released code, between 0.4 and 2.3 (Llama-3.1-8B at 1024 entries: 1.6
and 0.4); the defaults here are 1 and 1, since no such table holds for another model.

Departures from the released code: it evicts after every layer of prefill, also from what earlier layers hold, to bound
the peak; without ties that ends in the same sets, and here all layers are thinned once the prompt is in. At decode
steps scores are pooled in the order of positions, not of scores; the newest entries take part in pooling; a KV head
goes by the mean of its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, odd, thinned
from kvtool.methods._frozen import measured
from kvtool.methods._prompts import prompts
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a KV head keeps in the mean over layers, a share of the prompt when at most 1, else a count.
    window: last queries that score, whose entries always stay. gamma: weight of the variance in an entry's score. tau1,
    tau2: temperatures of entropy and variance in a layer's share. kernel: neighbours whose scores are averaged. decode:
    evict at every step, or append. mode: layers' shares by each prompt, or calibrated. samples, tokens: prompts, text
    and passkeys, and their length that mode=calibrated measures."""

    budget: float = 0.25
    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    kernel: int = 5
    decode: Literal["evict", "append"] = "evict"
    mode: Literal["prompt", "calibrated"] = "prompt"
    samples: int = 6
    tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(1, self, "window", "samples", "tokens")
        at_least(0, self, "gamma")
        odd(self.kernel, "kernel")
        if min(self.tau1, self.tau2) <= 0:
            raise InputError("bad temperature", got=f"tau1 {self.tau1}, tau2 {self.tau2}", expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    taus = {"tau1": options.tau1, "tau2": options.tau2}
    keep = _keep(context, options, options.budget, spread="preference", settings=taus)
    if options.mode == "prompt":
        return Decision(keep)
    shares = measured(context, keep, prompts(context, samples=options.samples, tokens=options.tokens))
    return Decision(_keep(context, options, shares), {"share": shares})


def _keep(context: Context, options: Options, budget: float | torch.Tensor, **dealing: Any) -> Keep:
    return thinned(
        context, budget, observed=options.window, variance=options.gamma, pool="mean", kernel=options.kernel,
        recent=options.window, when="step" if options.decode == "evict" else "prefill", decay=0.0, **dealing,
    )  # fmt: skip
