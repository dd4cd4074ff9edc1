"""RAPID: the model drafts from a short prompt, the chunks that its question asks for, and verifies with the long one.

Chen et al., arXiv 2502.20330, ICML 2025.

    prompt' = the prompt's retrieved chunks, in order, and its question:  prefilled by itself, in a cache of its own
    z, p: logits and law of the full cache, q: law of the draft
    g = p − q where q ≥ α·max q, else 0;   p̂ = softmax(z − η·g);   accept x ~ q if u ≤ p̂(x) / q(x)
    rejected: draw from max(p − q, p − p̂, 0), normalised;   all accepted: one more from p

η = 0 is the default, and lossless: p̂ = p, and the output has the full cache's law. **η > 0 is lossy on purpose**: what
is written follows the draft where the two differ, which the paper finds better than the full cache on long prompts
(η from 5 to 50); the verdict says so.

The retriever is the user's, who gives `spans`, or ours: the paper's is an embedding model of its own, which is not
here. Our scores are in `retrieval.py`. The paper has chunks of up to 512 tokens, cut at paragraphs, 8,192 tokens in all
and a cosine of 0.3 at least, for prompts of 100,000 tokens; ours are equal pieces, and the defaults are meant for 1,000
tokens. The released code (John-AI-Lab/RAPID, 22d41f4; card C13) always samples. Greedy decoding is ours: a drafted
token is accepted while it is the best of z − η·g, with laws at temperature 1, and the first other best is written
instead. The draft writes a heuristic number of tokens a round there, `tokens` here. Its model may be another there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share
from kvtool.options import at_least
from kvtool.slots import Draft, Excerpt

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """eta: how far the full cache's logits are moved towards the draft, η; above 0 is lossy. alpha: share of the
    draft's largest probability that a token must have to be moved. tokens: drafted a round, γ. spans: chunks of the
    prompt that are given, tokens from-to, like 0-64,300-420; none: chosen by score. score: our retriever, by mean input
    embeddings or by words in common. chunk: tokens of a chunk. budget: tokens of all chunks, a share of the prompt when
    at most 1, else a count. least: score that a chunk must have. start, question: first and last tokens of the prompt
    that the draft always has; the last ones ask."""

    eta: float = 0.0
    alpha: float = 0.1
    tokens: int = 4
    spans: tuple[str, ...] = ()
    score: Literal["embedding", "words"] = "embedding"
    chunk: int = 64
    budget: float = 0.25
    least: float = -1.0
    start: int = 0
    question: int = 64

    def __post_init__(self) -> None:
        at_least(1, self, "tokens", "chunk", "question")
        at_least(0, self, "start", "eta")
        share(self.alpha, "alpha")
        if not self.budget > 0:
            raise InputError("bad option budget", got=self.budget, expected="a share up to 1, or a count of tokens")


def calibrate(context: Context, options: Options) -> Decision:
    excerpt = Excerpt(
        _read(options.spans), options.score, options.chunk, options.budget, options.least, options.start,
        options.question,
    )  # fmt: skip
    return Decision(draft=Draft(options.tokens, excerpt=excerpt, eta=options.eta, alpha=options.alpha))


def _read(spans: tuple[str, ...]) -> torch.Tensor | None:
    """("0-64", "300-420") → int32 [2,2]."""
    try:
        pairs = [(int(first), int(end)) for first, end in (span.split("-") for span in spans)]
        return torch.tensor(pairs, dtype=torch.int32) if spans else None
    except ValueError as error:
        raise InputError("cannot read the spans", got=",".join(spans), expected="tokens from-to, like 0-64") from error
