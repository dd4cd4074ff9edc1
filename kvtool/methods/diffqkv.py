"""DiffQKV: what keys and values can each afford, in heads and in channels, and a budget spent unequally by it.

Sigma: Lin et al., arXiv 2501.13629 (read as abstract and summaries, card B16).

The paper trains a model whose keys are held narrower than its values, because its keys stand it better, and spends the
saving on wider queries. A cache cannot retrain; what calibration takes from it is the question. Per layer and side:

    heads   p neighbouring KV heads hold their mean instead (p the smallest prime factor of K): 1/p of the bytes
    dims    each head holds D/p numbers instead of D: rank (a basis) or channels (the most important)
    ledger[l, side, axis] = ‖O − Ô‖ / ‖O‖ of the attention output, all heads of the layer and side at once

and the same as KL divergence (`effect`, to second order). The plan spends `budget` on widths of keys and of values,
`unit` by unit: one pair of widths for the model (side, as the paper), for each layer, or for each head, so that the
predicted KL is least (as `allocate`, of which this is the axis of widths alone).

    memory 2·(r_k + r_v) bytes a token and KV head of encoded entries

What the card warns of stands: at equal bits keys are the more fragile side, at equal widths that may be values; do not
carry a ratio from one axis to the other. Merging heads is measured and not used: models that were not trained so break.
Left out: wider queries, which need pre-training, and loading only the values of the largest attention weights, which is
a matter of reading (slot `read`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Raw
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Join, Linear
from kvtool.errors import InputError
from kvtool.methods import _candidates as ways
from kvtool.methods import _holding as hold
from kvtool.methods import _weighing as weigh
from kvtool.methods._base import Context, Decision, full_attention, share
from kvtool.methods._candidates import Candidate
from kvtool.methods._dealing import dealt
from kvtool.methods._holding import SIDES, Candidates, Windows
from kvtool.methods._weighing import Errors
from kvtool.options import at_least
from kvtool.slots import RAW, Store

STATISTICS = ("gram",)
MODEL = True
AXES = ("heads", "dims")


@dataclass(frozen=True)
class Options:
    """budget: share of the bytes of 16-bit keys and values that encoded entries take; 1 leaves them as they are. cut:
    numbers of a head that stay: of a basis (rank), or channels. widths: what a head's width may be, shares of it. unit:
    what has one width: a side of the model, a layer's, or a KV head's. sink, recent: first and newest entries that stay
    raw. block: entries that leave the raw window together. samples, tokens, steps: texts that errors are measured on,
    their length, and the tokens decoded after each. draws: answers drawn for the gradients of a text."""

    budget: float = 0.5
    cut: Literal["rank", "channels"] = "rank"
    widths: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    unit: Literal["side", "layer", "head"] = "layer"
    sink: int = 4
    recent: int = 32
    block: int = 32
    samples: int = 3
    tokens: int = 512
    steps: int = 128
    draws: int = 4

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "tokens", "steps", "draws", "block")
        at_least(0, self, "sink", "recent")
        if not share(self.budget, "budget"):
            raise InputError("bad option budget", got=self.budget, expected="a share above 0")

    @property
    def windows(self) -> Windows:
        return Windows(self.sink, self.recent, self.block)


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g, whole = context.geometry, full_attention(context.geometry)
    if options.budget == 1 or not bool(whole.any()):
        return Decision(store=Store((), (), torch.full(whole.shape, RAW, dtype=torch.int32)))
    parts = _factor(g.kv_heads)
    texts = weigh.samples(context, count=options.samples, tokens=options.tokens, steps=options.steps)
    candidates, effect, size = weigh.effects(
        context, texts, options.windows, lambda met: _all(context, options, met.values, parts), options.draws
    )
    ledger, kl = (_ledger(errors, whole) for errors in (size, effect))
    last = {side: len(candidates[side]) - len(AXES) for side in SIDES}  # the two of the ledger come last
    candidates = {side: candidates[side][: last[side]] for side in SIDES}
    effect = {side: effect[side][: last[side]] for side in SIDES}
    ratio = weigh.anchored(context, effect, candidates, texts, options.windows)
    bits = {side: weigh.bits(context, candidates[side]) for side in SIDES}
    error = {side: effect[side] * ratio[side][:, None, None] for side in SIDES}
    choice, made = dealt(context, candidates, bits, error, ratio, 16 * options.budget, options.unit)
    held = torch.stack([bits[side][choice.ways[number]] for number, side in enumerate(SIDES)]) / 16  # [2,L,K]
    evidence = {
        "ledger": ledger.sqrt().float(), "effect": kl.float(), "share": held.float(),
        **{f"error.{side}": error[side].float() for side in SIDES},
    }  # fmt: skip
    facts = {
        "keys": float(held[0][whole].mean()), "values": float(held[1][whole].mean()), "predicted": made.error,
        "ledger_share": 1 / parts,
    }  # fmt: skip
    return Decision(None, evidence, facts, hold.stored(context, candidates, choice, options.windows))


def _factor(heads: int) -> int:
    """The smallest prime factor, or 2 for one head, which has only channels to lose."""
    return next((part for part in range(2, heads + 1) if heads % part == 0), 2)


def _all(context: Context, options: Options, met: torch.Tensor, parts: int) -> Candidates:
    """16 bits, the widths, and the ledger's two."""
    g, gram = context.geometry, context.seen["gram"]
    sides: dict[weigh.Side, tuple[torch.Tensor, torch.Tensor]] = {
        "keys": (gram["k"], gram["q"]),
        "values": (ways.blocks(gram["v"], g.kv_heads), met),
    }
    make = ways.low_rank if options.cut == "rank" else ways.channels
    return {
        side: [
            ways.sixteen(),
            *(make(*moments, count) for count in ways.widths(options.widths, g.head_dim)),
            merged(g.kv_heads, g.head_dim, parts),
            make(*moments, max(1, g.head_dim // parts)),
        ]
        for side, moments in sides.items()
    }


def merged(kv_heads: int, width: int, parts: int) -> Candidate:
    """`parts` neighbouring KV heads hold their mean; as they are if there is one head."""
    if kv_heads % parts:
        return ways.sixteen()
    one = torch.eye(width)
    step = Linear(one.repeat(parts, 1)[None] / parts, one.repeat(1, parts)[None])
    return Candidate(f"{parts} heads in one", (Encoding(Raw("float16"), (Join(parts), step)),))


def _ledger(errors: Errors, whole: torch.Tensor) -> torch.Tensor:
    """Errors of the last two candidates, [C,L,K] by side → fp64 [L,2,2]: layer, side, axis."""
    return torch.stack([(errors[side][-len(AXES) :] * whole).sum(2).T for side in SIDES], dim=1)
