"""What both sides write after the same prompt, and where they first part."""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.corpus.text import text
from kvtool.options import at_least
from kvtool.replay.subject import SIDES, Progress, Result, Subject, half

METRICS = ("same_tokens",)


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
    ids, written = {}, {}
    for side, cache in subject.both(prompt[:, :-1]).items():
        out = subject.greedy(cache, prompt[:, -1:], options.tokens)[0]
        ids[side], written[side] = out.tolist(), subject.model.tokenizer.decode(out)
        progress("generation")
    same = next((i for i, (a, b) in enumerate(zip(ids["full"], ids["plan"], strict=True)) if a != b), options.tokens)
    detail = {"prompt_end": subject.model.tokenizer.decode(prompt[0, -24:]), **written}
    return Result({"same_tokens": float(same)}, {**detail, "tokens": options.tokens})


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(SIDES)


def show(result: Result):
    """The two texts side by side: (columns, rows) for the terminal."""
    same, most = int(result.metrics["same_tokens"]), result.detail["tokens"]
    parted = f"the same {most} tokens" if same == most else f"part after {same} of {most} tokens"
    return ("full cache", f"this plan ({parted})"), [(result.detail["full"].strip(), result.detail["plan"].strip())]
