"""Law 5, first half: more budget, less error, down to none."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.window import Window
from kvtool.model import Model
from kvtool.plan import Plan
from tests.laws.methods import ROWS, across, plan
from tests.models import repeated
from tests.running import feed, own
from tests.tolerance import TOLERANCE

PERIOD = 24
SLACK = 1e-3  # nats; larger budgets may not be worse by more than this


def divergence(model: Model, made: Plan, ids: torch.Tensor) -> float:
    """Mean KL divergence (nats) of the compressed run from the full one over the last copy, which is decoded."""
    prompt = ids.shape[1] - PERIOD
    cache = SegmentCache(model, made, protocol="official" if across(made) else "strict")
    logits = feed(model, cache, ids, [prompt, *[1] * PERIOD])[:, prompt:]
    full = own(model, ids)[:, prompt:].log_softmax(-1)
    return float((full.exp() * (full - logits.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.ladder])
def test_error_falls_with_budget(name: str, induction: Model) -> None:
    ids = torch.stack([repeated(PERIOD, 3, seed=seed) for seed in range(2)])
    errors = [divergence(induction, plan(name, induction, options), ids) for options in ROWS[name].ladder]
    assert all(later <= earlier + SLACK for earlier, later in itertools.pairwise(errors)), errors
    assert errors[0] > ROWS[name].loss  # the smallest budget loses what the copies need
    assert errors[-1] <= TOLERANCE[torch.float32][0]


@pytest.mark.parametrize("compensate", [False, True])
def test_a_single_head_errs_less_with_a_wider_window(compensate: bool) -> None:
    torch.manual_seed(0)
    tokens, width, heads = 64, 16, 256  # each head is an independent draw; the error is their mean
    q, k, v = (torch.randn(1, heads, tokens, width) for _ in range(3))
    step = Step(start=0, scale=width**-0.5, softcap=None, strict=True)
    everything = Window(list(range(heads)), sink=0, recent=tokens).step(q, k, v, step)[0]
    errors = []
    for recent in (1, 4, 12, 24, 40, 56, 64):
        out, _ = Window(list(range(heads)), sink=0, recent=recent, compensate=compensate).step(q, k, v, step)
        errors.append(float((out - everything)[:, :, -1].norm(dim=-1).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5 > errors[-1]
    assert errors[-1] <= TOLERANCE[torch.float32][0]


def test_compensation_errs_less_than_dropping() -> None:
    torch.manual_seed(0)
    tokens, width, heads = 64, 16, 256
    q = 0.3 * torch.randn(1, heads, tokens, width)  # flat attention, where one mean can stand for many
    k, v = torch.randn(1, heads, tokens, width), 1 + torch.randn(1, heads, tokens, width)
    step = Step(start=0, scale=width**-0.5, softcap=None, strict=True)
    everything = Window(list(range(heads)), sink=0, recent=tokens).step(q, k, v, step)[0]
    dropping, averaging = (
        float((Window(list(range(heads)), sink=2, recent=8, compensate=c).step(q, k, v, step)[0] - everything).norm())
        for c in (False, True)
    )
    assert averaging < 0.8 * dropping
