"""TriForce: the model drafts for itself over the few chunks that its prompt's last query looks at.

Sun et al., arXiv 2404.11912, COLM 2024.

    once the prompt is in, per layer and KV head:  k̄_c = the mean key, after RoPE, of chunk c;  s_c = q · k̄_c, where q
    is the prompt's last query;  chunk 0 and the best chunks are copied, `budget` entries in all, and chosen once
    a round drafts γ tokens over the copy, the full cache verifies them;  tokens per pass (1 − α^(γ+1)) / (1 − α)
    memory 2·b·d·L·K·(t + budget):  both caches are held

The copy's size is fixed: what is decoded takes the place of the worst chunks (`tail=overwrite`), so that it runs out of
retrieved entries, and then of the oldest decoded ones. `tail=grow`, ours, lets it grow instead, and composes with
methods that encode or read. Query heads that share a KV head choose together by the `group` of their products: the
released code knows no such heads, so that this is ours too.

The third tier of the paper is a small model with a StreamingLLM cache that drafts for the copy. Here the same model
does so over sinks and a window (`window`): it costs a whole forward pass a token, so that it is worth its while only
where reading the copy is what a pass costs.

Where we depart from the released code (Infini-AI-Lab/TriForce, 164c8c0; card C12): a rejection by the middle tier draws
from the residual max(p − q, 0), where the code draws from p, so that its sampled output has another law. The copy is
chosen by the last token of what is fed as the prompt, not in a pass of one token. Prompts need not be whole chunks,
nor the budget: the last chunk that is chosen is cut to its newest entries, and when the worst chunk goes its oldest
entry goes first, where the code overwrites the newest first. What is decoded may exceed the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, thinned
from kvtool.options import at_least
from kvtool.slots import Draft, Keep

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that the drafting cache keeps of the prompt, a share when at most 1, else a count. chunk: entries
    that are chosen together. tokens: drafted a round, γ. group: how the query heads of a KV head agree, mean, max or
    sum of their products. tail: what is decoded takes the place of the worst chunks (overwrite), or is kept besides
    (grow). window: recent entries of a third cache that drafts for this one; 0: there is none. sink: its first entries.
    ahead: tokens that it drafts at a time."""

    budget: float = 0.25
    chunk: int = 8
    tokens: int = 6
    group: Literal["mean", "max", "sum"] = "mean"
    tail: Literal["overwrite", "grow"] = "overwrite"
    window: int = 0
    sink: int = 16
    ahead: int = 2

    def __post_init__(self) -> None:
        at_least(1, self, "chunk", "tokens", "ahead")
        at_least(0, self, "window", "sink")
        if 1 < self.budget < self.chunk:
            raise InputError("bad option budget", got=self.budget, expected=f"a share, or a chunk of {self.chunk}")


def at(budget: float) -> dict[str, Any]:
    """A share of what the drafting cache holds: the full cache is held besides."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.budget, observed=1, score="chunk-means", settings={"chunk": options.chunk},
        group=options.group, sink=options.chunk, when="step" if options.tail == "overwrite" else "prefill",
    )  # fmt: skip
    return Decision(keep, draft=Draft(options.tokens, _below(context, options), options.ahead))


def _below(context: Context, options: Options) -> Keep | None:
    """What the third cache keeps."""
    if not options.window:
        return None
    nothing = torch.zeros(context.geometry.layers, context.geometry.kv_heads, dtype=torch.bool)
    return Keep.heads(nothing, sink=options.sink, recent=options.window, position="reindex")
