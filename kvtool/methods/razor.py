"""RazorAttention: induction and echo heads keep everything, the others sinks, a window and one averaged entry.

Tang et al., arXiv 2407.15891, ICLR 2025.

On a repeated random string, echo is a query head's attention to earlier copies of the current token, induction its
attention to the tokens after those. A KV head scores as the best of its group; the top `induction` share by induction
and the top `echo` share by echo keep the full cache. The other heads keep S sinks, R recent entries, and the mean key
and value of the N entries dropped, with log N added to its logit.

    memory 2·b·d·(K_full·t + K_rest·(S + R + 1));   R = max(recent, recent_ratio · prompt length)

The shares 14 % and 1 % are from the vendor's released scoring code; 4 sinks, a window of max(4000, n/5) and the
compensation formula are from memory of the paper (card A3). The ALiBi variant is not here. The released code's
mean over the whole matrix ranks alike but scales otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtool.methods._base import Context, Decision, best, full_attention, per_kv_head, share
from kvtool.slots import Keep

STATISTICS = ("induction",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """induction, echo: shares of the KV heads that keep everything. sink, recent: entries of the others, tokens.
    recent_ratio: window as a share of the prompt, if that is more. compensate: keep the averaged entry."""

    induction: float = 0.14
    echo: float = 0.01
    sink: int = 4
    recent: int = 4000
    recent_ratio: float = 0.2
    compensate: bool = True


def at(budget: float) -> dict[str, Any]:
    """A window of 0.6 of the budget, and as many full heads, 14 to 1, as the rest pays for."""
    window = 0.6 * budget
    full = (budget - window) / (1 - window)
    return {"induction": full * 14 / 15, "echo": full / 15, "recent": 1, "recent_ratio": window}


def calibrate(context: Context, options: Options) -> Decision:
    statistic, g = context.seen["induction"], context.geometry
    scores = {
        name: per_kv_head(statistic[name] / statistic["rows"], g.kv_heads).float() for name in ("induction", "echo")
    }
    eligible = full_attention(g)
    full = ~eligible
    for name in ("induction", "echo"):
        wanted = round(share(getattr(options, name), name) * int(eligible.sum()))
        full |= best(scores[name], wanted, eligible, context.seed)
    keep = Keep.heads(
        full, sink=options.sink, recent=options.recent, compensate=options.compensate, recent_ratio=options.recent_ratio
    )
    return Decision(keep, scores, {"full_heads": int((full & eligible).sum())})
