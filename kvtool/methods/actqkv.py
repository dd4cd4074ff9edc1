"""ActQKV: unusual tokens choose which blocks are read, and layers that look everywhere get more of them.

Xiao et al., arXiv 2502.13542 (ACL 2025).

    probe p = Σ_t w_t q_t over the last `asked` queries before RoPE, all heads side by side;   w = φ / Σ φ
    φ_t = mean over channels c of (q_tc − μ_c)² / (σ²_c + mean(σ²) / 100)
    of a block of `unit` entries: r = the mean of the `keys` keys, before RoPE, that were attended most while recent
    the blocks with the largest cos(p, r) are read, alike in all heads of a layer
    layers in turn: K_l = E_l / Σ_{m ≥ l} E_m of what is left of L · budget, between `least` and `most` times budget
    E_l = H(softmax of the cosines) / ln(#blocks)

`mode=calibrated` takes μ, σ² and E of each layer from a trace, once. `mode=prompt` takes μ and σ² of all queries that
came so far, and gives layers alike.

Where we depart from the released code (MrXiaoaa/ActQKV, 175c84b; card C8): μ, σ² and E are each layer's own, not one
for all layers and requests, as they are there by accident; ours are exact means, without its decay after 1,000 updates,
and budgets do not move while text is written (the code's follow the last 100 E, and are even until there are so many).
A prompt is read whole by itself; the code reads it too by blocks, 256 tokens at a time, with the question's own
representative beside the probe. In decoding its window of queries is the newest one alone: `asked=1`. A KV head's keys
stand for its query heads, whose attention is summed. `positions=far` is its: sinks and blocks stand `recent` tokens
before the query, which changes what the model computes; the default leaves entries where they are. Cosines are nearly
even under a softmax, so that the budgets of layers differ little, there as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ("queries", "block-entropy")
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that layers read in the mean, a share of all when at most 1, else a count. mode: what queries are
    usual, and the budgets of layers, calibrated; or the former by each prompt, the latter alike. unit: entries of a
    block. keys: keys that stand for a block. asked: last queries that choose; 1 is the newest alone. least, most: how
    many times the mean budget a layer's own may be. positions: where blocks stand for the query: at their own distance
    or far, `recent` tokens away. heads: whether all heads of a layer choose together, or those of a KV head, and how;
    or each by itself. dense: first layers that read everything. sink, recent: entries that are always read. slow: the
    others live in host memory."""

    budget: float = 0.1
    mode: Literal["calibrated", "prompt"] = "calibrated"
    unit: int = 32
    keys: int = 4
    asked: int = 32
    least: float = 0.7
    most: float = 2.0
    positions: Literal["original", "far"] = "original"
    heads: Literal["layer", "max", "mean", "each"] = "layer"
    dense: int = 0
    sink: int = 16
    recent: int = 64
    slow: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, "unit", "keys", "asked", "recent")
        at_least(0, self, "dense", "sink")
        if self.budget <= 0 or not 0 <= self.least <= 1 <= self.most:
            raise InputError(
                "bad option", got=f"budget {self.budget}, least {self.least}, most {self.most}",
                expected="budget > 0 and 0 <= least <= 1 <= most",
            )  # fmt: skip


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g, usual, evidence = context.geometry, None, {}
    budget = torch.full((g.layers,), options.budget)
    if options.mode == "calibrated":
        seen = context.seen["queries"]
        mean = seen["sum"] / seen["tokens"].clamp_min(1)
        square = seen["square"].diagonal(dim1=2, dim2=3) / seen["tokens"].clamp_min(1)
        variance = (square - mean.square()).clamp_min(0)
        usual = torch.stack([mean, variance], 2).unflatten(1, (g.kv_heads, -1)).float()
        entropy = context.seen["block-entropy"]
        even = entropy["entropy"] / entropy["windows"].clamp_min(1)
        free = [layer for layer in range(options.dense, g.layers) if g.windows[layer] is None]
        budget[free] = dealt(even[free], options.budget, options.least, options.most, options.unit)
        evidence = {"entropy": even.float()}
    budget[: options.dense] = 1.0
    read = Read(
        budget, unit=options.unit, summary="attended", rank=options.keys, query="probe", asked=options.asked,
        usual=usual, bare=True, cosine=True, heads=options.heads, positions=options.positions, sink=options.sink,
        recent=options.recent, slow=options.slow,
    )  # fmt: skip
    return Decision(read=read, evidence=evidence)


def dealt(entropy: torch.Tensor, budget: float, least: float, most: float, unit: int) -> torch.Tensor:
    """entropy [L] → budgets fp32 [L], layer by layer: a share of what is left, as the layer's entropy is of theirs that
    are still to come; shares at most 1, or counts of whole units."""
    if budget == 1:
        return torch.ones(len(entropy))
    grain = 0.0 if budget < 1 else float(unit)
    found: list[float] = []
    left = budget * len(entropy)
    ahead = entropy.double().flip(0).cumsum(0).flip(0)
    for own, rest in zip(entropy.tolist(), ahead.tolist(), strict=True):
        wanted = left * own / rest if rest > 0 else left / (len(entropy) - len(found))
        wanted = round(wanted / grain) * grain if grain else wanted
        wanted = min(max(wanted, least * budget), most * budget, float("inf") if grain else 1.0)
        found.append(wanted)
        left -= wanted
    return torch.tensor(found)
