"""Held-out text, decoded token by token with the true tokens fed back: perplexity, KL divergence and top-1 agreement.

perplexity ratio = exp(mean NLL under the plan − mean NLL under the full cache); KL(full ‖ plan) in nats, mean
over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtool.corpus.base import Corpus
from kvtool.corpus.text import text
from kvtool.model import Model
from kvtool.options import at_least
from kvtool.replay.subject import SIDES, Progress, Result, Subject, half

METRICS = ("perplexity", "perplexity_full", "perplexity_ratio", "kl", "agreement")
QUALITY, ASKED, SHORT = "agreement", False, {"samples": 2, "tokens": 64}


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
    first = options.prompt - 1
    caches = subject.both(ids[:, :first], ids[:, first:-1])
    totals = {"full": 0.0, "plan": 0.0, "kl": 0.0, "agreement": 0.0}
    for at in range(first, ids.shape[1] - 1):
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


def compared(model: Model, options: Options, length: int, seed: int) -> Corpus:
    """The prompts of a comparison, of one length; their answers are what follows in the text."""
    corpus = text(
        model, list(options.source), tokens=length + options.tokens, samples=options.samples, seed=seed,
        half=half(options.source),
    )  # fmt: skip
    made = (replace(s, tokens=s.tokens[:length], answer=s.tokens[length:], length=length) for s in corpus.samples)
    return replace(corpus, samples=tuple(made))


def score(full: torch.Tensor, plan: torch.Tensor, answer: torch.Tensor) -> dict[str, float]:
    """Logits [A,V] of both, forced along answer [A] → means over its tokens."""
    logs, mine = full.log_softmax(-1), plan.log_softmax(-1)
    loss, own = (-side.gather(1, answer[:, None]).mean().item() for side in (logs, mine))
    return {
        "loss_full": loss,
        "loss": own,
        "kl": (logs.exp() * (logs - mine)).sum(-1).mean().item(),
        "agreement": (logs.argmax(-1) == mine.argmax(-1)).float().mean().item(),
    }


def tally(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over prompts of equally many tokens."""
    mean = {name: sum(found[name] for found in scores) / len(scores) for name in scores[0]}
    ratio = math.exp(mean["loss"] - mean["loss_full"])
    return {"perplexity_ratio": ratio, "kl": mean["kl"], "agreement": mean["agreement"], "prompts": len(scores)}


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return options.tokens
