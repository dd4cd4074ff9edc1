"""How much of what the full cache writes the plan would have drafted, whether it drafts or not.

    answer   what the full cache writes greedily after held-out text
    greedy   share of the answer's tokens that the plan ranks first, given those before
    sampled  mean of Σ_x min(p(x), q(x)), the chance that a token drawn from the plan's law q is accepted under the full
             cache's p, at temperature 1

The answer is forced through the plan's cache in one forward (see `replay/forced.py`), so that this costs no
speculation. A draft in use is corrected after every round by the full cache's keys and values, where here the plan goes
on from its own; and what it drafts after a token that is rejected counts there, not here. So acceptance as `generation`
measures it is another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Corpus
from kvtool.corpus.text import text
from kvtool.model import Model
from kvtool.options import at_least
from kvtool.plan import Plan
from kvtool.replay.forced import forced
from kvtool.replay.subject import SIDES, Progress, Result, Subject, half

METRICS = ("greedy_acceptance", "sampled_acceptance")
QUALITY, ASKED, SHORT = "acceptance", False, {"samples": 2, "tokens": 64}
DRAFTS = True


@dataclass(frozen=True)
class Options:
    """source: text files, or "default". prompt: tokens prefilled. tokens: tokens that the full cache writes. samples:
    texts."""

    source: tuple[str, ...] = ("default",)
    prompt: int = 1000
    tokens: int = 64
    samples: int = 2

    def __post_init__(self) -> None:
        at_least(1, self, "prompt", "tokens", "samples")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = compared(subject.model, options, options.prompt, subject.seed)
    found = []
    for sample in corpus.samples:
        assert sample.answer is not None
        follow = torch.cat([sample.tokens[-1:], sample.answer[:-1]])[None]
        caches = subject.both(sample.tokens[None, :-1], follow)
        logits = {side: forced(subject.model, caches[side], follow)[0] for side in SIDES}
        found.append(score(logits["full"], logits["plan"], sample.answer))
        progress("acceptance")
    mean = tally(found)
    metrics = {"greedy_acceptance": mean["acceptance"], "sampled_acceptance": mean["sampled"]}
    return Result(metrics, {"prompt": options.prompt, "tokens": options.tokens, "corpus": corpus.provenance})


def compared(model: Model, options: Options, length: int, seed: int) -> Corpus:
    """The prompts of a comparison, of one length; their answers are what the full cache writes, stops not heeded."""
    corpus = text(
        model, list(options.source), tokens=length, samples=options.samples, seed=seed, half=half(options.source)
    )
    writer = Subject(model, Plan("full", model.fingerprint))
    made = []
    with model.served():
        for sample in corpus.samples:
            cache = SegmentCache(model)
            writer.prefill(cache, sample.tokens[None, :-1])
            answer = writer.greedy(cache, sample.tokens[None, -1:], options.tokens)[0]
            made.append(replace(sample, answer=answer, length=length))
    return replace(corpus, samples=tuple(made))


def score(full: torch.Tensor, plan: torch.Tensor, answer: torch.Tensor) -> dict[str, float]:
    """Logits [A,V] of both, forced along answer [A] → means over its tokens."""
    return {
        "acceptance": (plan.argmax(-1) == answer).float().mean().item(),
        "sampled": torch.minimum(full.softmax(-1), plan.softmax(-1)).sum(-1).mean().item(),
    }


def tally(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over prompts of equally many tokens."""
    mean = {name: sum(found[name] for found in scores) / len(scores) for name in scores[0]}
    return {**mean, "prompts": len(scores)}


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return options.samples
