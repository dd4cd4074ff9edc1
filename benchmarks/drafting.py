"""Acceptance against budget: what plans draft, on held-out prompts, and whether the output is the full cache's.

python benchmarks/drafting.py [--tokens 1000] [--prompt 1000] [--samples 1] [--drafted 4] [--budgets 0.5,0.25,0.1]
                              [--methods triforce,streaming,snapkv,kivi,quest,rapid]

Greedy decoding step by step over the full cache is the reference. A first difference counts as a near tie where the
reference's two best logits lie within 1e-4. "forced" is what `kvtool compare --tasks acceptance` says: the share of the
reference's tokens that the plan ranks first when it is fed them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from _harness import table

from kvtool import options
from kvtool.calibrate import calibrate, method, reads
from kvtool.corpus.text import text
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.plan import Plan
from kvtool.replay.forced import forced
from kvtool.replay.subject import Subject
from kvtool.slots import Draft
from kvtool.speculate import NEAR, speculate

OTHERS: dict[str, dict[float, dict[str, Any]]] = {  # methods whose budget is no `at`: options under about that share
    "rapid": {share: {"budget": share, "question": 32} for share in (0.5, 0.25, 0.1)},
}


@dataclass
class Sums:
    """Over the prompts of one plan and budget."""

    proposed: int = 0
    accepted: int = 0
    passes: int = 0
    same: int = 0
    ties: int = 0
    hits: int = 0
    held: float = 0.0
    seconds: float = 0.0


def plans(
    model: Model, names: list[str], budgets: list[float], drafted: int
) -> Iterator[tuple[tuple[str, str], float, Plan]]:
    """Every method at every budget, as a draft of so many tokens a round: one that drafts by itself, or `draft` over
    the cache of one that does not."""
    for name in names:
        module = method(name)
        for budget in budgets:
            try:
                at = getattr(module, "at", None)
                values = OTHERS[name][budget] if at is None else at(budget)
                if reads(module, options.build(module.Options, values, name)):
                    raise InputError("a trace is needed")
                made = calibrate(name, values, model=model)
            except (InputError, KeyError) as error:
                print(f"{name} at {budget:g}: {error}", file=sys.stderr)
                continue
            told = ("draft", f"`{name}`") if made.draft is None else (name, "")
            yield told, budget, replace(made, draft=replace(made.draft or Draft(), tokens=drafted))


def reference(subject: Subject, prompt: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[bool]]:
    """Greedy tokens int64 [1,steps] of the full cache, one by one; and which of them are near ties."""
    cache, token = subject.cache("full", prompt.shape[1]), prompt[:, -1:]
    subject.prefill(cache, prompt[:, :-1])
    tokens, near = [], []
    for _ in range(steps):
        logits = subject.step(cache, token).cpu()
        best = logits[0].topk(2).values
        near.append(bool(best[0] - best[1] < NEAR))
        token = logits.argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, dim=1), near


def run(subject: Subject, prompt: torch.Tensor, expected: torch.Tensor, near: list[bool], sums: Sums) -> str:
    """One prompt → where its first difference is, or "–"."""
    steps = expected.shape[1]
    follow = torch.cat([prompt[:, -1:], expected[:, :-1]], dim=1)
    caches = subject.both(prompt[:, :-1], follow)
    sums.hits += int((forced(subject.model, caches["plan"], follow)[0].argmax(-1) == expected[0]).sum())
    caches = subject.both(prompt[:, :-1], follow)
    sums.held += caches["plan"].nbytes / caches["full"].nbytes
    start = time.perf_counter()
    out = speculate(
        subject.model, caches["full"], caches["plan"], prompt[:, -1:], steps, subject.plan.draft,
        below=subject.below(caches["full"]),
    )  # fmt: skip
    sums.seconds += time.perf_counter() - start
    parted = (out.tokens[0] != expected[0]).nonzero().flatten().tolist()
    first = parted[0] if parted else steps
    sums.proposed, sums.accepted = sums.proposed + out.proposed, sums.accepted + out.accepted
    sums.passes, sums.same = sums.passes + out.passes, sums.same + first
    sums.ties += len(out.near_ties)
    if first == steps:
        return "–"
    return f"{first}, near tie" if near[first] or first in out.near_ties else f"{first}, NO near tie"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--drafted", type=int, default=4)
    parser.add_argument("--budgets", default="0.5,0.25,0.1")
    parser.add_argument("--methods", default="triforce,streaming,snapkv,kivi,quest,rapid")
    chosen = parser.parse_args()
    model, rows = load("smollm2"), []
    samples = text(model, ["default"], tokens=chosen.prompt, samples=chosen.samples, seed=1, half="held-out").samples
    full = Subject(model, Plan("full", model.fingerprint))
    with model.served():
        expected = [reference(full, sample.tokens[None], chosen.tokens) for sample in samples]
        print(f"reference: {sum(sum(near) for _, near in expected)} near ties", file=sys.stderr)
        budgets = [float(share) for share in chosen.budgets.split(",")]
        for (name, over), budget, made in plans(model, chosen.methods.split(","), budgets, chosen.drafted):
            sums, subject = Sums(), Subject(model, made)
            parted = [
                run(subject, sample.tokens[None], tokens, near, sums)
                for sample, (tokens, near) in zip(samples, expected, strict=True)
            ]
            total = chosen.tokens * len(samples)
            rows.append((
                f"`{name}`", over, f"{budget:g}", f"{sums.held / len(samples):.3f}",
                f"{sums.accepted / max(1, sums.proposed):.3f}",
                f"{sums.hits / total:.3f}", f"{total / sums.passes:.2f}", f"{sums.same} of {total}", sums.ties,
                "; ".join(parted), f"{sums.seconds:.0f} s",
            ))  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    columns = (
        "method", "over", "budget", "held ÷ full", "accepted", "forced", "tokens a pass", "tokens until a difference",
        "near ties", "first difference", "time",
    )  # fmt: skip
    title = f"Drafting {chosen.drafted} tokens a round, greedy, {chosen.tokens} tokens after {chosen.prompt}"
    table(f"{title}, {len(samples)} prompts of held-out text", columns, rows)


if __name__ == "__main__":
    main()
