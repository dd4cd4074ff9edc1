"""Retrieval heads: heads that look at the very token being copied keep everything, the others sinks and a window.

Wu et al., arXiv 2404.15574.

    score(h) = mean over answered prompts of |copied by h ∩ needle| / |needle|

A needle token is copied by a head when, in a decode step, the head's top-1 key is that token and the step generates
it. A prompt is answered when more than half of the needle's tokens were generated. A KV head scores as the best of
its group of query heads (`reduce=max`; the paper scores query heads and says nothing of groups); the top `full` share
of the KV heads keeps the full cache, the others `sink` first and `recent` last entries at their original positions.

    memory 2·b·D·(K_full·t + K_window·min(t, sink + recent))

The paper ranks heads and compresses nothing: cutting the cache by this ranking is what its followers do. `mode=code`
takes the released code's sum instead, where each step adds 1/|needle|, so that a repeated needle token can push a
score above 1. The released code finds the needle by the overlap of token sets and stops at tokens of one vocabulary;
here its place is exact and stop tokens are the model's. It ends its prompts with the question, ours end with the
needle's first words. That less than 5 % of the heads score above 0.1 is from memory of the paper (card A1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, best, full_attention, per_kv_head, share
from kvtool.methods._gates import at as at
from kvtool.slots import Keep

STATISTICS = ("retrieval",)
MODEL = False
ABOVE = 0.1  # the paper calls a head with a higher score a retrieval head


@dataclass(frozen=True)
class Options:
    """full: share of KV heads that keep everything. sink, recent: entries of the others, tokens. mode: count a needle
    token once (paper) or once a step (code). reduce: a KV head scores as the max or the mean of its query heads.
    answered: prompts that must have been answered for heads to be ranked."""

    full: float = 0.5
    sink: int = 16
    recent: int = 64
    mode: Literal["paper", "code"] = "paper"
    reduce: Literal["max", "mean"] = "max"
    answered: int = 1


def calibrate(context: Context, options: Options) -> Decision:
    statistic, g = context.seen["retrieval"], context.geometry
    counted, prompts = int(statistic["counted"]), int(statistic["prompts"])
    if counted < options.answered:
        raise InputError(
            "too few needles were found to rank heads", got=f"{counted} of {prompts} prompts answered",
            expected=f"{options.answered} or more",
            remedy="profile again with shorter prompts, like --set needle.lengths=300",
        )  # fmt: skip
    scores = (statistic["score" if options.mode == "paper" else "steps"] / max(1, counted)).float()
    eligible = full_attention(g)
    wanted = round(share(options.full, "full") * int(eligible.sum()))
    grouped = per_kv_head(scores, g.kv_heads, options.reduce)
    full = best(grouped, wanted, eligible, context.seed) | ~eligible
    facts = {
        "full_heads": int((full & eligible).sum()),
        "full_heads_without_score": int((full & eligible & (grouped == 0)).sum()),
        "query_heads_above_0.1": int((scores > ABOVE).sum()),
    }
    evidence = {"score": scores, "counted": torch.tensor([counted, prompts])}
    return Decision(Keep.heads(full, sink=options.sink, recent=options.recent), evidence, facts)
