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

A draft may have a draft of its own `below` it: what that one proposes, the upper one verifies by the same rounds, so
that its proposals have its own law q again. A draft with an excerpt for a prompt holds other tokens than the full
cache; it keeps the keys and values that it computed itself. η > 0 nudges p towards q (see `nudged`), and is lossy.

A pass over several tokens rounds otherwise than one token at a time: where two best logits nearly tie, greedy output
may part from decoding step by step. Such steps are reported. It knows no plan's other slots, and writes one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.trial import Trial
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.slots import Draft

NEAR = 1e-4  # two best logits this close may change places by rounding


@dataclass(frozen=True)
class Outcome:
    """tokens: int64 [1,steps]. proposed, accepted: drafted tokens. passes: over the full cache; drafting: over each
    drafting cache, the upper one first. near_ties: numbers of the tokens whose two best logits lie within `NEAR`."""

    tokens: torch.Tensor
    proposed: int
    accepted: int
    passes: int
    near_ties: tuple[int, ...]
    drafting: tuple[int, ...] = ()

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted; NaN if none was drafted."""
        return self.accepted / self.proposed if self.proposed else math.nan

    @property
    def tokens_per_pass(self) -> float:
        """Tokens written per pass over the full cache."""
        return self.tokens.shape[1] / self.passes


@dataclass(frozen=True)
class Rule:
    """How a round is judged: see `speculate` and `Draft`."""

    temperature: float = 0.0
    generator: torch.Generator | None = None
    eta: float = 0.0
    alpha: float = 0.1

    def law(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [V] → probabilities; of temperature 1 where decoding is greedy."""
        return law(logits, self.temperature or 1.0)


class Tier:
    """A cache and what it has been fed of the sequence that is being written: its first `fed` tokens, of which `kept`
    are held and the others on trial."""

    def __init__(self, model: Model, cache: SegmentCache):
        self.model, self.cache, self.trial = model, cache, Trial(cache)
        self.fed = self.kept = self.passes = 0

    def forward(self, sequence: list[int]) -> torch.Tensor:
        """Feed what is lacking → its logits fp32 [T,V], on the CPU."""
        ids = torch.tensor([sequence[self.fed :]], device=self.model.device)
        with self.model.served(), torch.no_grad():
            logits = self.model.network(input_ids=ids, past_key_values=self.trial).logits
        self.fed, self.passes = len(sequence), self.passes + 1
        return logits[0].float().cpu()

    def cut(self, count: int) -> None:
        """Forget what was fed beyond the sequence's first `count` tokens."""
        if count < self.fed:
            self.fed = count
            self.trial.cut(count - self.kept)

    def keep(self, count: int) -> None:
        """The sequence's first `count` tokens, as far as they have been fed, are held."""
        now = min(self.fed, count)
        self.trial.keep(now - self.kept, self.cache)
        self.fed = self.kept = now


def speculate(
    model: Model,
    full: SegmentCache,
    draft: SegmentCache,
    token: torch.Tensor,
    steps: int,
    how: Draft | None = None,
    *,
    below: SegmentCache | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Outcome:
    """The `steps` tokens after `token` int64 [1,1], which follows what the caches hold; stops are not heeded.

    how: as a plan's slot says. below: the cache of `how.below`, if there is one. Temperature 0 is greedy; else
    `generator`, on the CPU, draws.
    """
    how = how or Draft()
    drafts = [draft] if below is None else [draft, below]
    _check(full, drafts if how.excerpt is None else [], token, steps, temperature)
    rule = Rule(temperature, generator, how.eta, how.alpha)
    top, tiers = Tier(model, full), [Tier(model, cache) for cache in drafts]
    sequence, near, proposed, accepted = [int(token)], list[int](), 0, 0
    while len(sequence) <= steps:
        drafted, laws = propose(tiers, sequence, min(how.tokens, steps - len(sequence)), how.ahead, rule)
        logits = top.forward(sequence + drafted)
        new = verify(logits, drafted, laws, rule)
        best = logits[: len(new)].topk(2).values
        near += [len(sequence) - 1 + at for at in (best[:, 0] - best[:, 1] < NEAR).nonzero().flatten().tolist()]
        proposed, accepted = proposed + len(drafted), accepted + len(new) - 1
        _keep(top, tiers, len(sequence) + len(new) - 1, apart=how.excerpt is not None)
        sequence += new
    drafting = tuple(tier.passes for tier in tiers)
    return Outcome(torch.tensor([sequence[1:]]), proposed, accepted, top.passes, tuple(near), drafting)


def _keep(top: Tier, tiers: list[Tier], count: int, *, apart: bool) -> None:
    """The sequence's first `count` tokens are held: by all as the full pass computed them, unless drafts hold what is
    their own."""
    if apart:
        for tier in (top, *tiers):
            tier.keep(count)
        return
    top.trial.keep(count - top.kept, top.cache, *(tier.cache for tier in tiers))
    for tier in (top, *tiers):
        tier.trial.drop()
        tier.fed = tier.kept = count


def propose(
    tiers: list[Tier], sequence: list[int], count: int, ahead: int, rule: Rule
) -> tuple[list[int], list[torch.Tensor]]:
    """`count` tokens after `sequence` by the first of the tiers, and the laws that it draws them from. The next tier,
    if there is one, proposes `ahead` of them at a time."""
    first, *rest = tiers
    drafted: list[int] = []
    laws: list[torch.Tensor] = []
    plain = Rule(rule.temperature, rule.generator)
    while len(drafted) < count:
        known = sequence + drafted
        short = min(ahead, count - len(drafted) - 1) if rest else 0
        guesses, theirs = propose(rest, known, short, ahead, plain) if short else ([], [])
        logits = first.forward(known + guesses)[-1 - len(guesses) :]
        new = verify(logits, guesses, theirs, plain)
        laws += [rule.law(row) for row in logits[: len(new)]] if rule.temperature or rule.eta else []
        drafted += new
        for tier in tiers:
            tier.cut(len(known) + len(new) - 1)
    return drafted, laws


def verify(logits: torch.Tensor, drafted: list[int], laws: list[torch.Tensor], rule: Rule) -> list[int]:
    """The tokens that a round writes: accepted ones and one more.

    logits [γ+1,V] of what verifies; laws: q [V] of each drafted token, which plain greedy rounds do not look at.
    """
    if rule.temperature == 0:
        moved = [int(nudged(row, q, rule).argmax()) for row, q in zip(logits, laws, strict=False)] if rule.eta else []
        best = [*moved, *logits[len(moved) :].argmax(-1).tolist()]
        same = next((at for at, token in enumerate(drafted) if token != best[at]), len(drafted))
        return best[: same + 1]
    for at, (token, q) in enumerate(zip(drafted, laws, strict=True)):
        p = rule.law(logits[at])
        aim = torch.softmax(nudged(logits[at], q, rule), -1) if rule.eta else p
        if torch.rand((), generator=rule.generator, dtype=p.dtype) * q[token] >= aim[token]:
            residual = torch.maximum(p - q, p - aim).clamp_min(0)
            return [*drafted[:at], draw(residual if bool(residual.sum() > 0) else p, rule.generator)]
    return [*drafted, draw(rule.law(logits[-1]), rule.generator)]


def nudged(logits: torch.Tensor, q: torch.Tensor, rule: Rule) -> torch.Tensor:
    """z − η·g, fp64 [V]: g = p − q for the tokens that the draft's law q [V] gives α of its largest probability, else 0
    (RAPID, arXiv 2502.20330)."""
    gap = rule.law(logits) - q
    return logits.double() / (rule.temperature or 1.0) - rule.eta * gap * (q >= rule.alpha * q.max())


def law(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [V] → probabilities, fp64."""
    return torch.softmax(logits.double() / temperature, -1)


def draw(weights: torch.Tensor, generator: torch.Generator | None) -> int:
    """An index, drawn by weights [V]."""
    return int(torch.multinomial(weights, 1, generator=generator))


def _check(full: SegmentCache, drafts: list[SegmentCache], token: torch.Tensor, steps: int, temperature: float) -> None:
    """drafts: those that must hold what the full cache holds."""
    if tuple(token.shape) != (1, 1):
        raise InputError("speculation writes one sequence", got=f"tokens {list(token.shape)}", expected="[1, 1]")
    if steps < 1 or not temperature >= 0:
        raise InputError(
            "bad speculation", got=f"{steps} steps, temperature {temperature}", expected="1 or more, and 0 or more"
        )
    if full.plan is not None:
        raise InputError("only the full cache verifies", got=f"a cache of the plan {full.plan.method}")
    for draft in drafts:
        if full.get_seq_length() != draft.get_seq_length():
            raise InputError(
                "the two caches do not hold the same tokens",
                got=f"{full.get_seq_length()} and {draft.get_seq_length()} of them",
                remedy="feed the same prompt to both",
            )
