"""One lane of a method that evicts by score, to be shown queries and keys: H = 4 query heads, K = 2 KV heads, D = 8."""

from __future__ import annotations

from typing import Any

import torch

from kvtool.cache.keep.budgets._base import Ballot
from kvtool.cache.keep.selector import Selector
from kvtool.cache.lane import Step
from kvtool.calibrate import calibrate
from kvtool.slots import Select
from tests import models

H, K, D = 4, 2, 8
STEP = Step(0, D**-0.5)
DRAW = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


def select(method: str, **settings: Any) -> Select:
    """What a method's plan for a tiny model selects by."""
    keep = calibrate(method, settings, model=models.with_tokenizer(models.shared("llama"))).keep
    assert keep is not None
    assert keep.select is not None
    return keep.select


def lane(spec: Select, layer: int = 0) -> Selector:
    return Selector(spec, spec.budget[layer].tolist(), layer, list(range(K)))


def prompted(made: Selector, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
    """What stays of a prompt fed at once, int64 [B,K,N]; the lane goes on with that."""
    v = k if v is None else v
    made.observe(q, 0, k, v, STEP, {})
    view = made.view(k, v, STEP, {})
    made.prompt_length = k.shape[2]
    scores = made.scores(view)
    ballot = Ballot(view, scores, made.limits(k.shape[2]), made.free(k.shape[2]))
    count = made.spec.rule("spread").deal([ballot])[0][0]
    index = made.choose(view, scores, count, scores)
    made.settle(scores.gather(2, index), count)
    return index


def step(made: Selector, q: torch.Tensor, k: torch.Tensor, fed: int, v: torch.Tensor | None = None) -> torch.Tensor:
    """What stays of the entries k [B,K,S,D], the last of which is that of the newest query q [B,H,1,D]."""
    v = k if v is None else v
    made.observe(q, fed - 1, k, v, STEP, {})
    view = made.view(k, v, STEP, {})
    scores, count = made.scores(view), made.due(k.shape[2], fed)
    index = made.choose(view, scores, count, scores) if count < k.shape[2] else torch.arange(count).expand(1, K, -1)
    made.settle(scores.gather(2, index), made.limit)
    return index
