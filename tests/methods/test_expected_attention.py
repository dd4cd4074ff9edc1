"""Expected Attention: the closed form against sampled queries, the law of queries, and a planted entry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.scores.expected import expected, score
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample, gather
from kvtool.methods._filled import scored
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.profile import profile
from kvtool.slots import Select
from kvtool.trace import Trace, statistic
from tests import models
from tests.models import random_ids
from tests.tolerance import close, same

SETTINGS = {"future": 1, "skip": 0, "covariance": True, "norm": True, "epsilon": 0.0}
H, K, D, S = 6, 2, 8, 12


def view(model: Model, settings: dict, tables: dict, **options) -> View:
    """Random entries at positions 0 … S − 1 of layer 0."""
    draw = torch.Generator().manual_seed(4)
    k, v = (torch.randn(1, K, S, D, generator=draw) for _ in range(2))
    spec = Select(torch.full((1, K), 0.5), score="expected", settings=SETTINGS | settings, tables=tables, **options)
    places = torch.arange(S).expand(1, K, -1)
    q = torch.zeros(1, H, 1, D)
    rotary = model.rotary(0)
    return View(q, torch.tensor([S - 1]), k, v, D**-0.5, None, spec, 0, [0, 1], 0, {"positions": places}, rotary)


def law() -> tuple[torch.Tensor, torch.Tensor]:
    """μ [1,H,D] and Σ [1,H,D,D]."""
    draw = torch.Generator().manual_seed(5)
    root = 0.3 * torch.randn(1, H, D, D, generator=draw)
    return torch.randn(1, H, D, generator=draw), root @ root.mT


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
@pytest.mark.parametrize("future", [1, 5])
def test_sampled_queries_agree_with_the_closed_form(future: int, name: str) -> None:
    """With one position to come, its rotation; with several, the mean of theirs, as a matrix."""
    model = models.shared(name)
    seen = view(model, {"future": future}, {})
    mean, covariance = law()
    draws = torch.randn(40_000, H, D, generator=torch.Generator().manual_seed(6))
    draws = torch.cat([draws, -draws])
    q = mean + torch.einsum("hij,nhj->nhi", torch.linalg.cholesky(covariance[0] + 1e-6 * torch.eye(D)), draws)
    rotary = model.rotary(0)
    turns = [rotary.rotate(torch.eye(D), rotary.table(torch.full((D,), at))) for at in range(S, S + future)]
    q = q @ torch.stack(turns).mean(0)
    keys = seen.k[0].repeat_interleave(H // K, 0)
    sampled = torch.stack([(seen.scale * q[:, head] @ keys[head].T).exp().mean(0) for head in range(H)])
    close(expected(seen, mean, covariance)[0], sampled.log(), torch.bfloat16)


def test_shares_norms_and_sinks() -> None:
    """a = z / Σ z over what is not sure to stay, times the value's norm."""
    mean, covariance = law()
    tables = {"mean": mean, "covariance": covariance}
    model = models.shared("llama")
    logits = expected(view(model, {}, tables), mean, covariance)[0]
    shares = torch.softmax(logits[:, 3:], -1)
    close(score(view(model, {"norm": False}, tables, sink=3))[0, :, 3:], shares)
    seen = view(model, {"epsilon": 0.01}, tables, sink=3)
    norms = seen.v[0].norm(dim=-1).repeat_interleave(H // K, 0)
    close(score(seen)[0, :, 3:], (shares + 0.01) * norms[:, 3:])
    plain = view(model, {"covariance": False, "norm": False}, tables)
    close(
        score(plain),
        score(replace(plain, spec=replace(plain.spec, tables={"mean": mean, "covariance": 0 * covariance}))),
    )


def traced(model: Model, ids: torch.Tensor) -> Trace:
    trace = Trace(model.fingerprint, model.name, {"queries": statistic("queries")(model, model.geometry)})
    profile(model, trace, {"text": gather("text", [Sample(ids, "text")], seed=0, options={})})
    return trace


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_a_trace_of_the_prompt_says_what_the_prompt_says(name: str) -> None:
    model, ids = models.shared(name), random_ids(1, 60, seed=7)[0]
    trace = traced(model, ids)
    settings = dict(future=9, sink=4)
    plans: list[Plan] = [
        calibrate("expected-attention", settings | dict(mode=mode), model=model, trace=trace)
        for mode in ("calibrated", "prompt")
    ]
    calibrated, own = (scored(model, plan.keep, ids) for plan in plans)
    for one, other in zip(calibrated, own, strict=True):
        close(one[:, 4:], other[:, 4:])


def test_a_key_where_queries_are_expected_stays() -> None:
    """The planted case: queries have a mean, one key lies along it, and the prompt's last query looks elsewhere."""
    model = models.shared("llama")
    mean = torch.zeros(1, H, D)
    mean[..., 3] = 6.0  # a pair that turns slowly
    seen = view(model, {"norm": False, "future": 4}, {"mean": mean, "covariance": torch.eye(D).expand(1, H, D, D)})
    rotary = model.rotary(0)
    key = rotary.rotate(mean[0, :1], rotary.table(torch.tensor([5])))[0]
    seen.k[:, :, 5] = key
    same(score(seen)[0].argmax(-1), torch.full((H,), 5))
