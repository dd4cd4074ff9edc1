"""Tokens that leave the forward, against the network's own layers called one by one on what is left."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtool import conflicts
from kvtool.cache.bulk import Bulk
from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.codecs import Raw
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.replay.subject import Subject
from kvtool.slots import Keep, Select, Store
from tests import models
from tests.laws.test_served import state
from tests.models import random_ids
from tests.running import feed, left_padded, own
from tests.tolerance import close, same

SERVED = ("llama", "qwen3", "gpt-neox", "mistral", "cohere")
LAST = 3  # queries that choose, whose own tokens always go on


def going(model: Model, *reach: float, select: Select | None = None, **options: Any) -> Plan:
    """A plan under which shares or counts `reach` of a prompt's tokens reach each layer."""
    g = model.geometry
    budget = torch.tensor(reach)[:, None].expand(-1, g.kv_heads).clone()
    spec = Select(budget, observed=LAST, recent=LAST, alike=True, pool="max", kernel=3, **options)
    full = torch.ones(g.layers, g.kv_heads, dtype=torch.bool)
    return Plan("test", model.fingerprint, keep=Keep.heads(full, sink=0, recent=1, select=select, onward=spec))


class Reference:
    """The network's own decoder layers, one by one; counts: how many tokens reach each."""

    def __init__(self, model: Model, counts: list[int]):
        self.network, self.counts = model.network, counts
        self.cache = DynamicCache(config=self.network.config)
        self.kept: list[list[int]] = []

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [1,T] → logits of the last token [V]."""
        return self._run(ids, torch.arange(ids.shape[1]), self.counts)

    def step(self, token: torch.Tensor, place: int) -> torch.Tensor:
        """token int64 [1,1] → its logits [V]."""
        return self._run(token, torch.tensor([place]), [1] * len(self.counts))

    def _run(self, ids: torch.Tensor, places: torch.Tensor, counts: list[int]) -> torch.Tensor:
        base, weights = self.network.base_model, []
        hidden = base.get_input_embeddings()(ids)
        layers = getattr(base, "layers")  # noqa: B009 (not of every base model)
        before = self.network.config._attn_implementation
        self.network.set_attn_implementation("eager")
        hooks = [
            next(m for n, m in layer.named_children() if n in ("self_attn", "attention")).register_forward_hook(
                lambda module, args, output: weights.append(output[1])
            )
            for layer in layers
        ]
        try:
            for layer, count in zip(layers, counts, strict=True):
                if count < hidden.shape[1]:
                    stay = self._best(weights[-1][0], count)
                    hidden, places = hidden[:, stay], places[stay]
                if ids.shape[1] > 1:
                    self.kept.append(places.tolist())
                size = hidden.shape[1]
                mask = torch.full((size, size), float("-inf"), dtype=hidden.dtype).triu(1) if size > 1 else None
                name = (
                    "layer_past" if "layer_past" in inspect.signature(layer.forward).parameters else "past_key_values"
                )
                hidden = layer(
                    hidden, attention_mask=None if mask is None else mask[None, None], position_ids=places[None],
                    position_embeddings=base.rotary_emb(hidden, position_ids=places[None]),
                    use_cache=True, **{name: self.cache},
                )  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
            self.network.set_attn_implementation(before)
        norm = base.norm if hasattr(base, "norm") else base.final_layer_norm
        logits = self.network.get_output_embeddings()(norm(hidden[:, -1]))[0]
        return logits * getattr(self.network.config, "logit_scale", 1.0)

    @staticmethod
    def _best(weights: torch.Tensor, count: int) -> torch.Tensor:
        """weights [H,T,T] → the places that go on: a mean over those of the last queries that see the token, the most
        of three neighbours, a mean over heads; of equals the newer."""
        tokens = weights.shape[1]
        score = torch.zeros(tokens)
        for head in weights[:, -LAST:].float():
            seen = torch.tensor([sum(tokens - LAST + row >= at for row in range(LAST)) for at in range(tokens)])
            mean = head.sum(0) / seen
            score += torch.stack([mean[max(0, at - 1) : at + 2].max() for at in range(tokens)]) / len(weights)
        score[-LAST:] = float("inf")
        order = sorted(range(tokens), key=lambda at: (-float(score[at]), -at))
        return torch.tensor(sorted(order[:count]))


def entries(cache: SegmentCache, layer: int, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that all heads of a layer hold, [K,S,D]."""
    part = next(part for part in cache.segments[layer].parts if row in part.rows)
    by_head = {head: (lane, at) for lane in part.lanes for at, head in enumerate(lane.heads)}
    pairs = [[x[0, at] for x in lane.recall()[:2]] for lane, at in (by_head[head] for head in sorted(by_head))]
    return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


@pytest.mark.parametrize("name", SERVED)
def test_later_layers_run_for_what_goes_on_alone(name: str) -> None:
    model, ids = models.double(name), random_ids(1, 31, seed=3)
    cache, reference = SegmentCache(model, going(model, 1.0, 0.5, 7.0)), Reference(model, [24, 12, 7])
    with torch.no_grad():
        expected = [reference.prompt(ids[:, :24])]
        expected += [reference.step(ids[:, at : at + 1], at) for at in range(24, 31)]
    logits = feed(model, cache, ids, [24, *[1] * 7])
    assert logits.shape[1] == 7 + 7  # of the prompt, those of what reached the end
    close(logits[0, 6:].float(), torch.stack(expected).float())  # eager attention has a softmax of fp32
    assert [len(kept) for kept in reference.kept] == [24, 12, 7]
    assert reference.kept[2] != list(range(17, 24))  # not simply the newest
    for layer, count in enumerate((24, 12, 7)):
        k, v = entries(cache, layer)
        assert k.shape[1] == count + 7
        close(k.float(), reference.cache.layers[layer].keys[0].float())
        close(v.float(), reference.cache.layers[layer].values[0].float())


@pytest.mark.parametrize("name", SERVED)
def test_with_nothing_left_out_it_is_the_model_itself(name: str) -> None:
    model, ids = models.shared(name), random_ids(2, 20, seed=4)
    assert going(model, 1.0, 1.0, 1.0).slots["keep"] is False
    cache = SegmentCache(model, going(model, 1.0, 900.0, 900.0))
    close(feed(model, cache, ids, [15, *[1] * 5]), own(model, ids))
    assert cache.entries().tolist() == [[20] * model.geometry.kv_heads] * 3


def test_rows_of_a_padded_batch_are_what_each_is_alone() -> None:
    model = models.double("llama")
    plan, rows = going(model, 1.0, 0.5, 0.3), [random_ids(1, size, seed=size)[0] for size in (30, 22, 11)]
    ids, mask = left_padded(rows)
    together = SegmentCache(model, plan)
    out = feed(model, together, ids, [24, *[1] * 6], mask=mask)[:, -7:]
    for row, tokens in enumerate(rows):
        alone = SegmentCache(model, plan)
        logits = feed(model, alone, tokens[None], [len(tokens) - 6, *[1] * 6])[0, -7:]
        close(out[row], logits)
        for layer in range(3):
            close(entries(together, layer, row)[0], entries(alone, layer)[0])


def test_moving_all_positions_changes_nothing() -> None:
    model, ids = models.shared("llama"), random_ids(1, 30, seed=6)
    plan = going(model, 1.0, 0.5, 0.2)
    here, there = (feed(model, SegmentCache(model, plan), ids, [25, *[1] * 5], shift=by) for by in (0, 17))
    close(here, there)


def test_a_selection_takes_its_share_of_the_whole_prompt() -> None:
    """8 of 40 reach the last layer, where a quarter of the prompt would be 10, and a tenth is 4."""
    model, ids = models.shared("llama"), random_ids(1, 44, seed=7)
    for share, held in ((0.25, 8), (0.1, 4)):
        select = Select(torch.full((3, 2), share), recent=1)
        cache = SegmentCache(model, going(model, 1.0, 0.5, 0.2, select=select), prompt_length=40)
        feed(model, cache, ids, [40, *[1] * 4])
        assert cache.entries()[:, 0].tolist() == [round(share * 40) + 4, round(share * 40) + 4, held + 4]


def test_keys_that_are_held_before_rope_turn_by_where_their_tokens_stood() -> None:
    """Turning back and forth cancels wherever they are said to have stood, so their positions are looked at too."""
    model, ids = models.shared("llama"), random_ids(1, 30, seed=8)
    reference = Reference(model, [24, 12, 12])
    with torch.no_grad():
        reference.prompt(ids[:, :24])
    index = torch.zeros(3, 2, dtype=torch.int32)
    before = Encoding(Raw(), rotated=False)
    store = Store(keys=(before,), values=(Encoding(Raw()),), index=index, sink=0, recent=2, block=2)
    for select in (None, Select(torch.full((3, 2), 9.0), recent=3)):
        plan = going(model, 1.0, 0.5, 0.5, select=select)
        raw, stored = SegmentCache(model, plan), SegmentCache(model, replace(plan, store=store))
        close(feed(model, stored, ids, [24, *[1] * 6]), feed(model, raw, ids, [24, *[1] * 6]))
        (part,) = stored.segments[2].parts
        assert part.fed == stored.segments[2].columns == 30
        (lane,) = part.lanes
        assert isinstance(lane, Bulk)
        assert lane.positions is not None
        for places in lane.positions[0].tolist():
            assert set(places) <= {*reference.kept[2], *range(24, 30)}
            assert len(places) == (18 if select is None else 15)
            assert places == sorted(places)


def test_generation_goes_on_and_nothing_remains() -> None:
    model, ids = models.build("llama"), random_ids(1, 24, seed=9)
    before = state(model.network)
    cache = SegmentCache(model, going(model, 1.0, 0.5, 0.2))
    with model.served(), torch.no_grad():
        out = model.network.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    again, steps = SegmentCache(model, going(model, 1.0, 0.5, 0.2)), []
    logits = feed(model, again, ids, [24])
    for _ in range(6):
        steps.append(int(logits[0, -1].argmax()))
        logits = feed(model, again, torch.tensor([[steps[-1]]]), [1], shift=23 + len(steps))
    assert out[0, 24:].tolist() == steps
    assert state(model.network) == before


def test_an_error_within_leaves_no_hooks() -> None:
    model, ids = models.build("llama"), random_ids(1, 24, seed=9)
    before, cache = state(model.network), SegmentCache(model, going(model, 1.0, 0.5, 0.2))
    broken = model.network.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with model.served():
        with pytest.raises(ZeroDivisionError):
            model.network(input_ids=ids, past_key_values=cache)
        broken.remove()
        full = SegmentCache(model)
        with torch.no_grad():
            same(model.network(input_ids=ids, past_key_values=full).logits, feed(model, SegmentCache(model), ids, [24]))
    assert state(model.network) == before


def test_a_prompt_in_chunks_is_refused() -> None:
    model, ids = models.shared("llama"), random_ids(1, 24, seed=9)
    plan = going(model, 1.0, 0.5, 0.2)
    with pytest.raises(InputError, match="in chunks"):
        feed(model, SegmentCache(model, plan), ids, [12, 12])
    with pytest.raises(InputError, match="in chunks"):
        feed(model, SegmentCache(model, plan, prompt_length=24), ids, [12, 12])
    cache = SegmentCache(model, plan)
    feed(model, cache, ids[:, :12], [12])
    cache.finish()
    feed(model, cache, ids[:, 12:], [12], shift=12)
    assert cache.entries()[:, 0].tolist() == [24, 18, 15]  # what follows goes through all layers


def test_whoever_chunks_prompts_feeds_these_at_once() -> None:
    model, ids = models.shared("llama"), random_ids(1, 24, seed=9)
    subject = Subject(model, going(model, 1.0, 0.5, 0.2), chunk=7)
    cache = subject.both(ids)["plan"]
    assert cache.entries()[:, 0].tolist() == [24, 12, 5]
    assert not SegmentCache(model, going(model, 1.0, 1.0, 1.0)).at_once


def test_what_it_cannot_do_is_refused() -> None:
    model, gemma = models.shared("llama"), models.shared("gemma3")
    with pytest.raises(InputError, match="protocol official"):
        SegmentCache(model, going(model, 1.0, 0.5, 0.2), protocol="strict")
    with pytest.raises(InputError, match="windows"):
        SegmentCache(gemma, going(gemma, 1.0, 0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="own cache"):
        SegmentCache(model, going(model, 1.0, 0.5, 0.2)).adopt(SegmentCache(model))
    with pytest.raises(InputError, match="go on"):
        going(model, 0.5, 0.5, 0.5)
    plan = going(model, 1.0, 0.5, 0.5)
    assert plan.keep is not None
    with pytest.raises(InputError, match="position=original"):
        conflicts.check(replace(plan, keep=replace(plan.keep, position="reindex")))
