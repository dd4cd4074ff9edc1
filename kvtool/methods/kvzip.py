"""KVzip: what the model looks at while it writes the prompt down again stays, whatever will be asked.

Kim et al., arXiv 2505.23416, NeurIPS 2025.

    the network is run once more, over [instruction | chunk] for each chunk of the prompt, after the whole cache
    s_j = max over that pass's queries, and over the query heads of the KV head, of their attention to entry j
    keep the best budget · L · K · n of all layers and heads together;      memory 2·b·d·budget·L·K·n

So the score depends on the context alone, and a question that comes later finds what an answer may need. It costs a
second prefill: m tokens at a time, each of which attends to all n entries. The passes are in
`kvtool/cache/keep/rebuild.py`.

`mode=heads` is the paper's context-independent form: a head scores what its best entry scores, the mean over prompts of
the calibration text; the best `full` heads keep everything and the others sinks and a window, as in DuoAttention.

From the released code (snu-mllab/KVzip, attention/score.py, model/wrapper.py): the softmax is over the first entries,
the chunk's and the pass's own; 8 tokens of the chunk before say where a later chunk begins; one threshold for the
model, or a budget for each head ("uniform"). There a system prompt is kept whole and the chat template ends the
instruction; here the first `sink` entries are kept, and the end of the instruction is an option. The instruction's
words are ours. The released head mode has one long English text; here it is several texts of `tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.corpus.base import piece
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, best, full_attention, share, thinned
from kvtool.methods._filled import filled, scores
from kvtool.methods._prompts import texts
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ()
MODEL = True


@dataclass(frozen=True)
class Options:
    """budget: entries kept of the prompt, a share when at most 1, else a count per KV head. spread: over what the
    budget is dealt out by score: model, layer, or head for each its own. mode: prompt scores each prompt; heads scores
    KV heads once, on calibration text. chunk: tokens that are written again in one pass. sink: first entries that
    always stay. score: attention, or value-attention for attention times the norm of the value. instruction: what
    asks for the first chunk, after a blank line. onward: what asks for a later one, before the tokens that it follows.
    opening: what ends either, before a new line. full: share of KV heads that keep everything. recent: entries of the
    others besides the first ones. samples, tokens: texts and their length that mode=heads measures."""

    budget: float = 0.25
    spread: Literal["model", "layer", "head"] = "model"
    mode: Literal["prompt", "heads"] = "prompt"
    chunk: int = 2000
    sink: int = 4
    score: Literal["attention", "value-attention"] = "attention"
    instruction: str = "Write the text above down again, word for word."
    onward: str = "Write the text above down again, word for word, beginning after:"
    opening: str = ""
    full: float = 0.5
    recent: int = 64
    samples: int = 4
    tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(1, self, "chunk", "recent", "samples", "tokens")
        at_least(0, self, "sink")
        share(self.full, "full")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    if context.model is None:
        raise InputError("kvzip asks the model to write", remedy="pass the model, or a trace that names it")
    words = {
        "instruction": f"\n\n{options.instruction}",
        "onward": f"\n\n{options.onward}",
        "opening": f"{options.opening}\n",
    }
    settings = {name: tuple(piece(context.model, told)) for name, told in words.items()}
    keep = thinned(
        context, options.budget, observe="rebuild", score=options.score, reduce="max", group="max",
        spread=options.spread, sink=options.sink, settings={**settings, "chunk": options.chunk},
    )  # fmt: skip
    if options.mode == "prompt":
        return Decision(keep)
    found = heads(context, options, keep)
    eligible = full_attention(context.geometry)
    full = best(found, round(options.full * int(eligible.sum())), eligible, context.seed) | ~eligible
    return Decision(
        Keep.heads(full, sink=options.sink, recent=options.recent), {"score": found},
        {"full_heads": int((full & eligible).sum())},
    )  # fmt: skip


def heads(context: Context, options: Options, keep: Keep) -> torch.Tensor:
    """fp32 [L,K]: what a head's best entry scores, mean over texts; 0 in layers that nothing thins."""
    read = texts(context, samples=options.samples, tokens=options.tokens)
    total = torch.zeros(context.geometry.layers, context.geometry.kv_heads)
    for cache in filled(context, keep, read, "heads"):
        for layer, found in enumerate(scores(cache, keep)):
            if found is not None:
                total[layer] += found[:, options.sink :].amax(1).float().cpu() / len(read)
    return total
