"""What both sides write after the same prompt, and where they first part.

Under a plan that drafts, its side is speculation: the plan's cache drafts, the full cache verifies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.text import text
from kvtool.options import at_least
from kvtool.replay.subject import SIDES, Progress, Result, Subject, half
from kvtool.speculate import speculate

DRAFTED = ("acceptance", "tokens_per_pass")  # only under a plan that drafts
METRICS = ("same_tokens", "identical", *DRAFTED)
DRAFTS = True


@dataclass(frozen=True)
class Options:
    """source: text files, or "default". prompt: tokens of it given. tokens: tokens generated, greedily."""

    source: tuple[str, ...] = ("default",)
    prompt: int = 1000
    tokens: int = 40

    def __post_init__(self) -> None:
        at_least(1, self, "prompt", "tokens")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = text(
        subject.model, list(options.source), tokens=options.prompt, samples=1, seed=subject.seed + 1,
        half=half(options.source),
    )  # fmt: skip
    prompt = corpus.samples[0].tokens[None]
    caches = subject.both(prompt[:, :-1], _expected(subject, prompt, options.tokens))
    written: dict[str, list[int]] = {}
    metrics: dict[str, float] = {}
    facts: dict[str, Any] = {}
    if subject.plan.draft is not None:
        written["plan"], metrics, facts = _drafted(subject, caches, prompt[:, -1:], options.tokens)
        caches = {"full": subject.cache("full", options.prompt)}
        subject.prefill(caches["full"], prompt[:, :-1])
        progress("generation")
    for side, cache in caches.items():
        written[side] = subject.greedy(cache, prompt[:, -1:], options.tokens)[0].tolist()
        progress("generation")
    pairs = zip(written["full"], written["plan"], strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), options.tokens)
    metrics |= {"same_tokens": float(same), "identical": float(same == options.tokens)}
    texts = {side: subject.model.tokenizer.decode(torch.tensor(written[side])) for side in SIDES}
    detail = {"prompt_end": subject.model.tokenizer.decode(prompt[0, -24:]), **texts}
    return Result(metrics, {**detail, "tokens": options.tokens, **facts})


def _expected(subject: Subject, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    """What the full cache is fed after the prompt int64 [1,T] but for its last token, for plans that look ahead."""
    if not subject.plan.foretold:
        return prompt[:, -1:]
    cache = subject.cache("full", prompt.shape[1])
    subject.prefill(cache, prompt[:, :-1])
    return torch.cat([prompt[:, -1:], subject.greedy(cache, prompt[:, -1:], steps)[:, :-1]], dim=1)


def _drafted(
    subject: Subject, caches: dict[str, SegmentCache], token: torch.Tensor, steps: int
) -> tuple[list[int], dict[str, float], dict[str, Any]]:
    """The tokens, metrics and facts of speculation after `token` int64 [1,1]."""
    assert subject.plan.draft is not None
    below = subject.below(caches["full"])
    out = speculate(subject.model, caches["full"], caches["plan"], token, steps, subject.plan.draft, below=below)
    metrics = {"acceptance": out.acceptance, "tokens_per_pass": out.tokens_per_pass}
    facts = {"proposed": out.proposed, "accepted": out.accepted, "passes": out.passes, "near_ties": out.near_ties}
    facts |= {"drafting_passes": out.drafting}
    return out.tokens[0].tolist(), metrics, facts


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(SIDES)


def show(result: Result):
    """The two texts side by side: (columns, rows) for the terminal."""
    same, most = int(result.metrics["same_tokens"]), result.detail["tokens"]
    parted = f"the same {most} tokens" if same == most else f"part after {same} of {most} tokens"
    if same < most and same in result.detail.get("near_ties", ()):
        parted += ", at a near tie"
    return ("full cache", f"this plan ({parted})"), [(result.detail["full"].strip(), result.detail["plan"].strip())]
