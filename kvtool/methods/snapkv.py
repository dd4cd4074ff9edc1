"""SnapKV: what the prompt's last queries look at stays, pooled so that neighbours stay together.

Li et al., arXiv 2404.14469, NeurIPS 2024.

    s_j = mean over the last w queries of their attention to entry j, of all query heads of the KV head;
    s ← maximum over `kernel` neighbours;   keep the C − w best of the others, and the w last;   memory 2·b·d·L·K·C

Decoded entries are all kept. The score is taken once, from the prompt's own last queries, so a question that comes
later finds only what this prompt's end asked for. The released code scores each query head and copies the cache to all
of them; here a KV head keeps one set, chosen by the mean over its group, which is what the bytes pay for. It pools what
stands before the window alone; here the window's entries take part, so that the ⌊kernel/2⌋ before it have their scores.
Published settings differ: the code's own are w 32 and a mean over 5, those shipped for long texts w 32 and a maximum
over 7. The defaults are w 32 and a maximum over 5, with the budget as a share of the prompt.

`observe=answer` is ours, and no method but a bound for them: the queries that score are those of the answer itself,
teacher-forced, which only a measurement on known answers can have (`kvtool/cache/keep/passes.py`). What the prompt's
own end misses of that is what asking earlier costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.methods._base import Context, Decision, odd, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries each KV head keeps of the prompt, a share when at most 1, else a count. window: last queries that
    score, whose entries always stay. kernel: neighbours that are pooled. pool: max, mean or none. sink: first entries
    that always stay. observe: whose queries score: the prompt's own, or the answer's, which only replay and compare
    know."""

    budget: float = 0.25
    window: int = 32
    kernel: int = 5
    pool: Literal["max", "mean", "none"] = "max"
    sink: int = 0
    observe: Literal["prompt", "answer"] = "prompt"

    def __post_init__(self) -> None:
        at_least(1, self, "window")
        at_least(0, self, "sink")
        odd(self.kernel, "kernel")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.budget, observed=options.window, pool=options.pool, kernel=options.kernel,
        recent=options.window, sink=options.sink, observe="answer" if options.observe == "answer" else "last",
    )  # fmt: skip
    return Decision(keep)
