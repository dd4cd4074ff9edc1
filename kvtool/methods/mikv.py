"""MiKV: what eviction would drop is held in few bits instead.

Yang et al., arXiv 2402.18096. No code was released; the card this follows is a summary and memory.

    importance of an entry = attention paid to it so far (as h2o);  the `high` most important stay as they are, the
    others are written once, per token: s = (max − min)/(2^b − 1), code = round((x − min)/s)
    keys are balanced first:  k' = k ⊙ b,  q' = q / b,  b_c = √(max |q_c| / max |k_c|) over the prompt

so that a key channel of large numbers, which would ruin its token's range, lends its size to the query's. A token goes
from high to low when others become more important, never back. `policy=given` leaves the choice to whatever selection
the plan is composed with, at the prompt's end or at every step.

Reconstructed: the balancer takes the largest query of the whole group (for shared KV heads the paper says nothing),
is fixed once the prompt is in, stands after RoPE, and is bounded to 10^±3. Between steps importance is the sum of
attention weights, the policy that the paper measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Balance
from kvtool.methods._base import Context, Decision, share, thinned
from kvtool.slots import RAW, Store

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """high: share of the prompt's entries that stay as they are. bits: of the others, 1 to 8. group: channels of a
    token that share a range, 0 for all of a head. recent: newest entries that are never demoted. balance: trade ranges
    between keys and queries. when: step, or prefill for one choice after the prompt. policy: attention, or given."""

    high: float = 0.2
    bits: int = 2
    group: int = 0
    recent: int = 8
    balance: bool = True
    when: Literal["step", "prefill"] = "step"
    policy: Literal["attention", "given"] = "attention"


def at(budget: float) -> dict[str, Any]:
    """Two or four bits for what is demoted, b + 1/2 with its ranges, of 16."""
    bits = 2 if budget < 0.35 else 4
    low = (bits + 0.5) / 16
    return {"bits": bits, "high": max(0.01, (budget - low) / (1 - low))}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    codec = Affine(options.bits, options.group or g.head_dim, "channel")
    key = Encoding(codec, (Balance(),) if options.balance else ())
    everywhere = torch.zeros(g.layers, g.kv_heads, dtype=torch.int32)
    lower = Store((key,), (Encoding(codec),), everywhere, block=1)
    store = Store((), (), torch.full_like(everywhere, RAW), rest=lower)
    if options.policy == "given":
        return Decision(store=store)
    keep = thinned(
        context, max(share(options.high, "high"), 1e-6), observe="all", score="attention", reduce="sum", group="sum",
        recent=options.recent, minimum=options.recent + 1, when=options.when, growing=options.when == "step",
    )  # fmt: skip
    return Decision(keep=keep, store=store)
