"""Documents read apart and put together: dense attention written out, order, positions, temperature and scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.contexts import Context, Contexts
from kvtool.cache.share.documents import check_moves
from kvtool.errors import InputError
from kvtool.measuring.apart import planned
from kvtool.model import Model
from kvtool.rotary import NONE
from kvtool.slots import Documents
from kvtool_kernels.ops import attend
from tests import models
from tests.cache.share.apart import DOCUMENTS, PREFIX, QUESTION, TEXTS, asked, document, prefixed, together
from tests.models import random_ids
from tests.running import own
from tests.tolerance import close, error


def masked(model: Model, prefix: torch.Tensor, texts: list[torch.Tensor], starts: list[int], end: int) -> torch.Tensor:
    """Logits of the question by one forward of the model itself over [prefix | texts | question], with a mask that lets
    texts see the prefix and themselves, and positions that begin at `starts` and `end`."""
    parts = [prefix, *texts, QUESTION[0]]
    number = torch.cat([torch.full((len(part),), at) for at, part in enumerate(parts)])
    places = torch.cat([torch.arange(len(p)) + at for p, at in zip(parts, [0, *starts, end], strict=True)])
    order = torch.arange(len(number))
    seen = (order <= order[:, None]) & (
        (number == number[:, None]) | (number == 0) | (number[:, None] == len(parts) - 1)
    )
    windows = {w: seen & (places > places[:, None] - w) for w in model.geometry.windows if w is not None}

    def bias(seen: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        return hidden[None, None]

    kinds = getattr(model.network.config, "layer_types", None)
    mask: object = bias(seen if not windows or kinds else next(iter(windows.values())))
    if windows and kinds:
        mask = {"full_attention": bias(seen), "sliding_attention": bias(next(iter(windows.values())))}
    with torch.no_grad():
        logits = model.network(
            input_ids=torch.cat(parts)[None], attention_mask=mask, position_ids=places[None], use_cache=False
        ).logits
    return logits[:, -QUESTION.shape[1] :]


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "rope-yarn", "gemma2", "gemma3", "mistral-window"])
def test_shared_positions_are_dense_attention_under_a_mask(name: str) -> None:
    model = models.shared(name)
    prefix = prefixed(model)
    cache = together(model, [document(model, prefix, ids) for ids in TEXTS], prefix)
    assert cache.segments[0].place == len(PREFIX) + max(DOCUMENTS)
    expected = masked(model, PREFIX, TEXTS, [len(PREFIX)] * 3, len(PREFIX) + max(DOCUMENTS))
    close(asked(model, cache), expected)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "rope-yarn", "gemma2", "gemma3", "mistral-window"])
def test_contiguous_positions_are_dense_attention_under_a_mask(name: str) -> None:
    """Without a prefix, which documents see from where they were read."""
    model = models.shared(name)
    cache = together(model, [document(model, None, ids) for ids in TEXTS], None, position="contiguous")
    expected = masked(model, PREFIX[:0], TEXTS, [0, 7, 19], sum(DOCUMENTS))
    close(asked(model, cache), expected)
    apart = together(model, [document(model, None, ids) for ids in TEXTS], None)
    assert error(asked(model, apart), expected) > 1e-2


@pytest.mark.parametrize("position", ["shared", "contiguous"])
def test_one_document_is_sequential_reading(position: str, any_model: Model) -> None:
    prefix = prefixed(any_model)
    cache = together(any_model, [document(any_model, prefix, TEXTS[1])], prefix, position=position)
    expected = own(any_model, torch.cat([PREFIX, TEXTS[1], QUESTION[0]])[None])[:, -QUESTION.shape[1] :]
    close(asked(any_model, cache, chunks=(4, 1, 1)), expected)


def test_the_order_of_documents_means_nothing_where_positions_are_shared() -> None:
    model = models.shared("gemma3")
    plan = planned(model, Documents(torch.full((4,), 0.7), torch.full((4,), 0.9)))
    plan = replace(plan, model=model.fingerprint, read=replace(plan.read, budget=torch.ones(model.geometry.layers)))
    prefix = prefixed(model)
    held = [document(model, prefix, ids) for ids in TEXTS]
    forth, back = (together(model, order, prefix, plan) for order in (held, held[::-1]))
    close(asked(model, forth), asked(model, back))
    moved = (together(model, order, prefix, position="contiguous") for order in (held, held[::-1]))
    assert error(*(asked(model, cache) for cache in moved)) > 1e-2


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_temperature_and_scale(softcap: float | None) -> None:
    """One layer, entry by entry: documents' logits are divided by T, and together they weigh exp(S · T · l_c)."""
    model, t, s, scale = models.double("llama"), 0.6, 0.8, 0.4
    prefix = prefixed(model)
    held = [document(model, prefix, ids) for ids in TEXTS[:2]]
    contexts = [Context(each, each.segments[1], len(PREFIX), NONE) for each in held]
    made = Contexts(17, Context(prefix, prefix.segments[1], 0, NONE), contexts, t, s)
    g = model.geometry
    draw = torch.Generator().manual_seed(5)
    q = torch.randn(2, g.query_heads, 3, g.head_dim, generator=draw, dtype=torch.float64)
    k, v = torch.randn(2, 2, g.kv_heads, 4, g.head_dim, generator=draw, dtype=torch.float64)
    out, lse = made.beside(q, attend(q, k, v, scale=scale, softcap=softcap), 0, scale, softcap)

    def entries(cache: SegmentCache) -> tuple[torch.Tensor, torch.Tensor]:
        (lane,) = cache.segments[1].parts[0].lanes
        return tuple(x[0].repeat_interleave(g.group, 0) for x in lane.recall()[:2])  # type: ignore[return-value]

    def logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        found = scale * q @ k.mT
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    for row in range(2):
        normal = [entries(prefix), tuple(x[row].repeat_interleave(g.group, 0) for x in (k, v))]
        x_k, x_v = (torch.cat(pair, 1) for pair in zip(*normal, strict=True))
        c_k, c_v = (torch.cat(pair, 1) for pair in zip(*map(entries, held), strict=True))
        x, c = logits(q[row], x_k), logits(q[row], c_k) / t
        weights = torch.stack([s * t * c.logsumexp(-1), x.logsumexp(-1)], -1)
        share = weights.softmax(-1)[..., None]
        close(out[row], share[..., 0, :] * (c.softmax(-1) @ c_v) + share[..., 1, :] * (x.softmax(-1) @ x_v))
        close(lse[row], weights.logsumexp(-1))


def test_turning_the_query_is_turning_the_keys() -> None:
    """A document 9 tokens later, by its own keys turned and by the query's."""
    model = models.double("rope-yarn")
    held = document(model, None, TEXTS[1])
    rotary = model.rotary(1)
    q = torch.randn(1, model.geometry.query_heads, 2, model.geometry.head_dim, dtype=torch.float64)
    k, v, _ = held.segments[1].parts[0].lanes[0].recall()
    source = torch.arange(12)[None]
    places = torch.tensor([30, 31])
    mine = Context(held, held.segments[1], 9, rotary, 9).attend(q, places, 0.3, None)
    theirs = attend(q, rotary.move(k, source, source + 9), v, scale=0.3)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, torch.float32)  # the tables are fp32


def test_many_questions_in_one_batch() -> None:
    model = models.shared("gemma3")
    prefix = prefixed(model)
    held = [document(model, prefix, ids) for ids in TEXTS]
    rows = random_ids(3, 5, seed=77)
    batch = asked(model, together(model, held, prefix), rows, (3, 1, 1))
    for at in range(3):
        close(batch[at : at + 1], asked(model, together(model, held, prefix), rows[at : at + 1], (3, 1, 1)))


@pytest.mark.parametrize("name", list(models.STRETCHED))
def test_moving_is_refused_where_rotation_depends_on_length(name: str) -> None:
    """Documents move exactly up to the length at which it changes, and neither they nor what follows may pass it."""
    model, texts = models.STRETCHED[name](0), [random_ids(1, 9, seed=at)[0] for at in range(4)]
    held = [document(model, None, ids) for ids in texts]
    expected = masked(model, PREFIX[:0], texts[:2], [0, 9], 18)
    close(asked(model, together(model, held[:2], None, position="contiguous")), expected)
    with pytest.raises(InputError, match=r"documents cannot be moved .* Let them share their positions"):
        together(model, held, None, position="contiguous")
    longer = together(model, held[:3], None, position="contiguous")
    with pytest.raises(InputError, match="cannot be turned back"):
        asked(model, longer)
    asked(model, together(model, held, None))


def test_moving_is_refused_without_rotation() -> None:
    with pytest.raises(InputError, match="enter elsewhere"):
        check_moves([NONE, NONE], 9)
