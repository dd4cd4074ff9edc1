"""Held-out text, decoded token by token with the true tokens fed back: perplexity, KL divergence and top-1 agreement.

perplexity ratio = exp(mean NLL under the plan − mean NLL under the full cache); KL(full ‖ plan) in nats, mean
over tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtool.corpus.text import text
from kvtool.options import at_least
from kvtool.replay.subject import SIDES, Progress, Result, Subject, half

METRICS = ("perplexity", "perplexity_full", "perplexity_ratio", "kl", "agreement")


@dataclass(frozen=True)
class Options:
    """source: text files, or "default". prompt: tokens prefilled. tokens: tokens decoded. samples: texts, decoded
    together."""

    source: tuple[str, ...] = ("default",)
    prompt: int = 1000
    tokens: int = 64
    samples: int = 4

    def __post_init__(self) -> None:
        at_least(1, self, "prompt", "tokens", "samples")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = text(
        subject.model, list(options.source), tokens=options.prompt + options.tokens, samples=options.samples,
        seed=subject.seed, half=half(options.source),
    )  # fmt: skip
    ids = torch.stack([sample.tokens for sample in corpus.samples])
    caches = subject.both(ids[:, : options.prompt - 1])
    totals = {"full": 0.0, "plan": 0.0, "kl": 0.0, "agreement": 0.0}
    for at in range(options.prompt - 1, ids.shape[1] - 1):
        target = ids[:, at + 1]
        logs = {side: torch.log_softmax(subject.step(caches[side], ids[:, at : at + 1]).cpu(), -1) for side in SIDES}
        for side in SIDES:
            totals[side] -= logs[side].gather(1, target[:, None]).sum().item()
        totals["kl"] += (logs["full"].exp() * (logs["full"] - logs["plan"])).sum().item()
        totals["agreement"] += (logs["full"].argmax(-1) == logs["plan"].argmax(-1)).sum().item()
        progress("held-out text")
    mean = {name: total / (options.tokens * len(ids)) for name, total in totals.items()}
    metrics = {
        "perplexity": math.exp(mean["plan"]),
        "perplexity_full": math.exp(mean["full"]),
        "perplexity_ratio": math.exp(mean["plan"] - mean["full"]),
        "kl": mean["kl"],
        "agreement": mean["agreement"],
    }
    return Result(metrics, {"prompt": options.prompt, "tokens": options.tokens, "corpus": corpus.provenance})


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return options.tokens
