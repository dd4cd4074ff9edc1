"""`generate` of transformers writes over a `SegmentCache` what it writes over its own: greedy, in batches, by beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.replay.subject import Subject
from tests.replay.conftest import LOSSLESS, windowed
from tests.running import feed, left_padded
from tests.tolerance import close, same

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 2},
    "more beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
}

LOSSY: dict[str, dict[str, Any]] = {"plain": {}, "mean": {"compensate": True}, "reindexed": {"position": "reindex"}}


def prompts(model: Model, *lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, left-padded to one length."""
    draw = torch.Generator().manual_seed(sum(lengths))
    return left_padded([torch.randint(1, model.geometry.vocabulary, (length,), generator=draw) for length in lengths])


def generate(model: Model, cache: Any, ids: torch.Tensor, mask: torch.Tensor, **way: Any) -> Any:
    return model.network.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, **way
    )


def by(model: Model, plan: Plan | None, ids: torch.Tensor, mask: torch.Tensor, **way: Any) -> Any:
    """Tokens by a `SegmentCache`."""
    with model.served():
        return generate(model, SegmentCache(model, plan, protocol="strict"), ids, mask, **way)


@pytest.mark.parametrize("lengths", [(21,), (21, 9, 15)], ids=["one", "padded batch"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", LOSSLESS)
def test_a_lossless_plan_writes_the_same(plan: str, way: str, lengths: tuple[int, ...], model: Model) -> None:
    ids, mask = prompts(model, *lengths)
    expected = generate(model, DynamicCache(config=model.network.config), ids, mask, **WAYS[way])
    same(by(model, windowed(model, **LOSSLESS[plan]), ids, mask, **WAYS[way]), expected)
    same(by(model, None, ids, mask, **WAYS[way]), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", LOSSY.values(), ids=LOSSY)
def test_a_lossy_plan_writes_alike_alone_and_in_a_batch(options: dict[str, Any], way: str, model: Model) -> None:
    plan, lengths = windowed(model, sink=1, recent=5, **options), (21, 9, 15)
    ids, mask = prompts(model, *lengths)
    together = by(model, plan, ids, mask, **WAYS[way])[:, ids.shape[1] :]
    rows = len(together) // len(lengths)
    for row, length in enumerate(lengths):
        alone = by(model, plan, ids[row : row + 1, -length:], mask[row : row + 1, -length:], **WAYS[way])[:, length:]
        same(together[row * rows : (row + 1) * rows], alone)


@pytest.mark.parametrize("options", LOSSY.values(), ids=LOSSY)
def test_a_beams_score_is_its_tokens_own(options: dict[str, Any], model: Model) -> None:
    """What the search added up while rows changed places equals one undisturbed pass over the winner."""
    plan = windowed(model, sink=1, recent=1, **options)
    ids, mask = prompts(model, 21, 21)
    found = by(model, plan, ids, mask, do_sample=False, num_beams=4, return_dict_in_generate=True, output_scores=True)
    tokens = found.sequences
    logits = feed(model, SegmentCache(model, plan, protocol="strict"), tokens, [21, *[1] * 12])[:, 20:-1]
    logs = logits.log_softmax(-1).gather(-1, tokens[:, 21:, None])
    close(found.sequences_scores, logs.mean((1, 2)))


def test_beams_part_from_greedy(model: Model) -> None:
    """Else reordering would go untested."""
    ids, mask = prompts(model, 21, 9, 15)
    plan = windowed(model, full=True)
    assert not torch.equal(by(model, plan, ids, mask, **WAYS["greedy"]), by(model, plan, ids, mask, **WAYS["beams"]))


@pytest.mark.parametrize("protocol", ["official", "strict"])
@pytest.mark.parametrize("full", [True, False])
def test_the_replays_own_greedy_writes_the_same(full: bool, protocol: Any, model: Model) -> None:
    """The prompt's last token goes through a decode step, which "strict" makes no difference to."""
    ids, mask = prompts(model, 21)
    plan = windowed(model, full=full)
    subject = Subject(model, plan, protocol=protocol)
    written = subject.greedy(subject.cache("plan", 21), ids, 12)
    if full or protocol == "strict":
        same(written, by(model, plan, ids, mask, **WAYS["greedy"])[:, 21:])
    same(written, subject.greedy(subject.cache("plan", 21), ids, 12))
