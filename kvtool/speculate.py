"""Self-speculation: a plan's cache drafts, the full cache verifies, and what is written is the full cache's.

A round drafts up to γ tokens over the draft's cache, one by one; then one pass over the full cache gives the law p of
the next token after each. Both keep the accepted tokens' keys and values of the full pass; the rest is forgotten (see
`cache/trial.py`).

    greedy     accept while the draft's token is the argmax of p; the first other argmax ends the round
    sampled    accept x ~ q with probability min(1, p(x)/q(x)); else draw from max(p − q, 0), normalised, and stop
    bonus      after γ acceptances one more token comes from p

Leviathan et al., arXiv 2211.17192; with the model's own compressed cache as the draft: TriForce, Sun et al., arXiv
2404.11912. The residual law is used throughout: the released code of TriForce draws from p after a rejection by its
middle model, which is another law.

A pass over several tokens rounds otherwise than one token at a time: where two best logits nearly tie, greedy output
may part from decoding step by step. Such steps are reported. It knows no plan's slots, and writes one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.trial import Trial
from kvtool.errors import InputError
from kvtool.model import Model

NEAR = 1e-4  # two best logits this close may change places by rounding


@dataclass(frozen=True)
class Outcome:
    """tokens: int64 [1,steps]. proposed, accepted: drafted tokens. passes: over the full cache. near_ties: numbers of
    the tokens whose two best logits lie within `NEAR`."""

    tokens: torch.Tensor
    proposed: int
    accepted: int
    passes: int
    near_ties: tuple[int, ...]

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted; NaN if none was drafted."""
        return self.accepted / self.proposed if self.proposed else math.nan

    @property
    def tokens_per_pass(self) -> float:
        """Tokens written per pass over the full cache."""
        return self.tokens.shape[1] / self.passes


def speculate(
    model: Model,
    full: SegmentCache,
    draft: SegmentCache,
    token: torch.Tensor,
    steps: int,
    *,
    tokens: int = 4,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Outcome:
    """The `steps` tokens after `token` int64 [1,1], which follows what both caches hold; stops are not heeded.

    `tokens` are drafted a round. Temperature 0 is greedy; else `generator`, on the CPU, draws.
    """
    _check(full, draft, token, steps, tokens, temperature)
    verifier, drafter = Trial(full), Trial(draft)
    written: list[int] = []
    last, proposed, accepted, passes, ties = int(token), 0, 0, 0, []
    while len(written) < steps:
        drafted, laws = _draft(model, drafter, last, min(tokens, steps - len(written) - 1), temperature, generator)
        logits = _forward(model, verifier, [last, *drafted])
        new = verify(logits, drafted, laws, temperature, generator)
        best = logits[: len(new)].topk(2).values
        ties += [len(written) + at for at in (best[:, 0] - best[:, 1] < NEAR).nonzero().flatten().tolist()]
        verifier.keep(len(new), full, draft)
        drafter.drop()
        proposed, accepted, passes = proposed + len(drafted), accepted + len(new) - 1, passes + 1
        written += new
        last = new[-1]
    return Outcome(torch.tensor([written]), proposed, accepted, passes, tuple(ties))


def verify(
    logits: torch.Tensor,
    drafted: list[int],
    laws: list[torch.Tensor],
    temperature: float,
    generator: torch.Generator | None = None,
) -> list[int]:
    """The tokens that a round writes: accepted ones and one more.

    logits [γ+1,V] of the full cache; laws: q [V] of each drafted token, which greedy rounds do not look at.
    """
    if temperature == 0:
        best = logits.argmax(-1).tolist()
        same = next((at for at, token in enumerate(drafted) if token != best[at]), len(drafted))
        return best[: same + 1]
    for at, (token, q) in enumerate(zip(drafted, laws, strict=True)):
        p = law(logits[at], temperature)
        if torch.rand((), generator=generator, dtype=p.dtype) * q[token] >= p[token]:
            residual = (p - q).clamp_min(0)
            return [*drafted[:at], draw(residual if bool(residual.sum() > 0) else p, generator)]
    return [*drafted, draw(law(logits[-1], temperature), generator)]


def law(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [V] → probabilities, fp64."""
    return torch.softmax(logits.double() / temperature, -1)


def draw(weights: torch.Tensor, generator: torch.Generator | None) -> int:
    """An index, drawn by weights [V]."""
    return int(torch.multinomial(weights, 1, generator=generator))


def _draft(
    model: Model, drafter: Trial, token: int, count: int, temperature: float, generator: torch.Generator | None
) -> tuple[list[int], list[torch.Tensor]]:
    """`count` tokens after `token`, and the laws that they were drawn from."""
    drafted: list[int] = []
    laws: list[torch.Tensor] = []
    for _ in range(count):
        logits = _forward(model, drafter, [token])[-1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            laws.append(law(logits, temperature))
            token = draw(laws[-1], generator)
        drafted.append(token)
    return drafted, laws


def _forward(model: Model, trial: Trial, tokens: list[int]) -> torch.Tensor:
    """Logits fp32 [T,V], on the CPU."""
    with model.served(), torch.no_grad():
        output = model.network(input_ids=torch.tensor([tokens], device=model.device), past_key_values=trial)
    return output.logits[0].float().cpu()


def _check(
    full: SegmentCache, draft: SegmentCache, token: torch.Tensor, steps: int, tokens: int, temperature: float
) -> None:
    if tuple(token.shape) != (1, 1):
        raise InputError("speculation writes one sequence", got=f"tokens {list(token.shape)}", expected="[1, 1]")
    if steps < 1 or tokens < 1 or not temperature >= 0:
        raise InputError(
            "bad speculation", got=f"{steps} steps, {tokens} drafted tokens, temperature {temperature}",
            expected="1 or more, 1 or more, and 0 or more",
        )  # fmt: skip
    if full.plan is not None:
        raise InputError("only the full cache verifies", got=f"a cache of the plan {full.plan.method}")
    if full.get_seq_length() != draft.get_seq_length():
        raise InputError(
            "the two caches do not hold the same tokens",
            got=f"{full.get_seq_length()} and {draft.get_seq_length()} of them", remedy="feed the same prompt to both",
        )  # fmt: skip
