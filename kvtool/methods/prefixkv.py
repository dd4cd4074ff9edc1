"""PrefixKV: every layer keeps the same share of its attention, whatever number of entries that takes.

Wang et al., arXiv 2412.03409, NeurIPS 2025.

    s_j = attention to entry j, summed over the prompt's queries, mean over all heads of the layer
    a layer keeps its best entries until they hold the share p of Σ s; one p for all layers, such that they hold
    `budget` of the prompt in the mean;   all heads of a layer hold the same entries;   memory 2·b·d·K·L·budget·t

At decode steps a layer goes on holding its share of all tokens so far. When it holds more, the entry `distance` places
before the newest is dropped, whatever it scores: what is older is frozen, what is newer is a window. The first `sink`
tokens and the prompt's last always stay.

The paper measures the layers' shares on a few samples, and uses them for all prompts: that is `mode=calibrated`, the
default, here on `samples` prompts, text and passkeys, in place of pictures with questions. `mode=prompt` searches p for
each prompt. The released search stops within 5 entries of the budget and scales the layers to meet it; here it meets
it. The number of samples is from memory (card A16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.methods._base import Context, Decision, thinned
from kvtool.methods._frozen import measured
from kvtool.methods._prompts import prompts
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a layer keeps in the mean, a share of all tokens when at most 1, else a count. sink: first
    entries that always stay. distance: places between the newest entry and the one that decode steps drop. decode:
    evict at every step, or append. mode: layers' shares calibrated, or by each prompt. samples, tokens: prompts, text
    and passkeys, and their length that mode=calibrated measures."""

    budget: float = 0.25
    sink: int = 4
    distance: int = 25
    decode: Literal["evict", "append"] = "evict"
    mode: Literal["calibrated", "prompt"] = "calibrated"
    samples: int = 10
    tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(1, self, "distance", "samples", "tokens")
        at_least(0, self, "sink")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = _keep(context, options, options.budget, spread="information")
    if options.mode == "prompt":
        return Decision(keep)
    shares = measured(context, keep, prompts(context, samples=options.samples, tokens=options.tokens))
    return Decision(_keep(context, options, shares), {"share": shares})


def _keep(context: Context, options: Options, budget: float | torch.Tensor, **dealing: Any) -> Keep:
    return thinned(
        context, budget, observe="all", reduce="sum", alike=True, sink=options.sink, recent=1, pick="distance",
        settings={"distance": options.distance}, growing=True,
        when="step" if options.decode == "evict" else "prefill", **dealing,
    )  # fmt: skip
