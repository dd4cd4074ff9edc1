"""Prompts for methods that calibrate on what a model does with text, or with text and a question, half and half.

Texts come from the default text, passkeys lie in the same: the half of it that no replay reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvtool.corpus.base import Sample
from kvtool.corpus.passkey import passkey
from kvtool.corpus.text import text
from kvtool.methods._base import Context
from kvtool.model import Model

DEPTHS = (0.5, 0.1, 0.9, 0.3, 0.7)  # where passkeys lie, in turn


def prompts(context: Context, *, samples: int, tokens: int, steps: int = 1) -> list[Sample]:
    """`samples` prompts of `tokens` tokens, each with an `answer`: what follows in the text, `steps` tokens of it, or
    the passkey; one text more where they are odd. Raises InputError without a model."""
    read = texts(context, samples=samples - samples // 2, tokens=tokens + steps)
    made = [replace(s, tokens=s.tokens[:tokens], answer=s.tokens[tokens:]) for s in read]
    return made + [_key(context.running, tokens, at, context.seed + at) for at in range(samples // 2)]


def texts(context: Context, *, samples: int, tokens: int) -> Sequence[Sample]:
    """`samples` texts of `tokens` tokens. Raises InputError without a model."""
    return text(context.running, tokens=tokens, samples=samples, seed=context.seed, half="calibration").samples


def _key(model: Model, tokens: int, at: int, seed: int) -> Sample:
    depths = (DEPTHS[at % len(DEPTHS)],)
    return passkey(model, lengths=(tokens,), depths=depths, keys=1, seed=seed, haystack="calibration").samples[0]
