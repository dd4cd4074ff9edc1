"""ZipVL: a layer keeps the fewest entries that hold the share τ of its attention.

He et al., arXiv 2410.08584, in its second version, which evicts; the first stored the other entries in fewer bits.

    a_j = Σ_i A_ij over probes i (the newest 5 % of the queries, and a random 5 % of the others), mean over all heads
    p = min {k: the k largest a_j hold τ · Σ a};   the p entries with the largest a_j / #{probes i ≥ j} stay
    all heads of a layer hold the same entries;   memory 2·b·d·K·Σ_l p_l

p goes by sums, in which early entries have a say of more queries, and the choice by means: so the chosen entries may
hold less than τ. `budget` bounds what layers hold in the mean; where τ asks for more, τ is lowered, for all layers
alike, until it is met. `mode=calibrated` measures p_l on `samples` prompts, text and passkeys, and freezes each layer's
mean share. Every decoded entry stays.

`prefill=sparse` also attends to the chosen entries only while the prompt is read, which is where the paper saves time:
a block of `block` queries reads those of them that stand before it, the `local` entries right before it, and itself.
That changes the prompt's own states, so that `dense` is the default.

No code was released. The score and its probes are of ZipCache, by the same authors, whose code divides by n − j; here,
by the probes that see the entry. τ = 0.975 is from memory (card A27). Whether queries of entries that are not chosen
are answered at all while the prompt is read is not known to us; here they are, and read themselves and their
neighbours. A prompt that is read in chunks chooses for each by its own probes. Where `budget` is below 1 every layer
reads that share at most while the prompt is read, but what it keeps is dealt among layers. The choice again every 100
tokens is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share, thinned
from kvtool.methods._frozen import measured
from kvtool.methods._prompts import prompts
from kvtool.options import at_least
from kvtool.slots import Keep, Prefill, Read

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """tau: share of its attention that a layer keeps; 1 is all entries. budget: entries that layers keep in the mean at
    most, a share of the prompt when at most 1, else a count. prefill: dense, or sparse: queries read the entries
    that hold tau of the attention, by probes. block: queries that read alike then. local: entries right before them
    that they always read. observe: probes, or all queries, for what is kept. mode: layers' shares by each prompt, or
    calibrated. samples, tokens: prompts, text and passkeys, and their length that mode=calibrated measures."""

    tau: float = 0.975
    budget: float = 1.0
    prefill: Literal["dense", "sparse"] = "dense"
    block: int = 64
    local: int = 16
    observe: Literal["probes", "all"] = "probes"
    mode: Literal["prompt", "calibrated"] = "prompt"
    samples: int = 6
    tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "tokens", "block")
        at_least(0, self, "local")
        if not share(self.tau, "tau"):
            raise InputError("bad option tau", got=0, expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    spread = "head" if options.budget == 1.0 else "information"
    mass = options.tau if options.tau < 1 else 0.0
    keep = _keep(context, options, options.budget, spread=spread, mass=mass)
    read = _read(context, options, mass)
    if options.mode == "prompt":
        return Decision(keep, read=read)
    shares = measured(context, keep, prompts(context, samples=options.samples, tokens=options.tokens))
    return Decision(_keep(context, options, shares), {"share": shares}, read=read)


def _read(context: Context, options: Options, mass: float) -> Read | None:
    """What the prompt's queries read, where not everything."""
    if options.prefill == "dense" or not mass:
        return None
    everything, budget = torch.ones(context.geometry.layers), torch.full((context.geometry.layers,), options.budget)
    prefill = Prefill(
        budget, rule="columns", block=options.block, local=options.local, dense=0, mass=mass, seed=context.seed
    )
    return Read(everything, unit=1, prefill=prefill)


def _keep(context: Context, options: Options, budget: float | torch.Tensor, **dealing: Any) -> Keep:
    return thinned(
        context, budget, observe=options.observe, reduce="sum", alike=True, recent=1, pick="per-query",
        seed=context.seed, **dealing,
    )  # fmt: skip
