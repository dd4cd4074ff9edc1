"""Keyformer: H2O with noise on the logits and a rising temperature, so that entries just below the best have a chance.

Adnan et al., arXiv 2403.09054, MLSys 2024.

    s_j = Σ_i softmax_j((x_ij + ζ_ij) / τ_t),   ζ ~ Gumbel(0, 1),   τ_t = τ_init + t·(τ_end − τ_init)/T
    keep the last `recent`·`keep`·n entries, and the best of the others up to `keep`·n;   memory 2·b·d·L·K·keep·n

x are the logits; t is 0 for the prompt and then counts steps. Attention itself is the ordinary one over what is left.
Noise is seeded by layer, KV head and step. `mode=code`: in the released masks every entry that leaves the window
after the prompt is lost for good, so that no new one ever becomes a key token; `mode=paper` lets it compete. Whether
the paper's text intends either could not be checked: that reading is ours. GQA is not in the paper: the group's mean
counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """keep: entries that stay, a share of the prompt when at most 1, else a count. recent: share of those that stay
    for being the latest. tau_init: temperature for the prompt. tau_end: temperature after so many decode steps as
    `steps` says. steps: decode steps over which the temperature rises. mode: paper or code."""

    keep: float = 0.6
    recent: float = 0.3
    tau_init: float = 1.0
    tau_end: float = 2.0
    steps: int = 512
    mode: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        at_least(1, self, "steps")
        share(self.recent, "recent")
        if not (self.keep > 0 and self.recent < 1 and 0 < self.tau_init <= self.tau_end):
            raise InputError(
                "bad option keep, recent or tau", got=f"{self.keep}, {self.recent}, {self.tau_init} to {self.tau_end}",
                expected="keep > 0, not all recent, and a positive temperature that does not fall",
            )  # fmt: skip


def at(budget: float) -> dict[str, Any]:
    return {"keep": budget}


def calibrate(context: Context, options: Options) -> Decision:
    recent = options.keep * options.recent if options.keep <= 1 else int(options.keep * options.recent)
    leaving: dict[str, Any] = {"pick": "distance", "settings": {"distance": 0}} if options.mode == "code" else {}
    keep = thinned(
        context, options.keep, observe="all", score="gumbel", reduce="sum", temperature=options.tau_init,
        warming=(options.tau_end - options.tau_init) / options.steps, recent=recent, when="step", seed=context.seed,
        **leaving,
    )  # fmt: skip
    return Decision(keep)
