"""Law 4: a left-padded batch equals each sequence alone, and shared KV heads equal copies of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from kvtool.cache.build import per_row
from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Store
from tests.laws.methods import TINY, across, looks_at_queries, on, only, places, ragged, tiny
from tests.models import random_ids
from tests.running import feed, left_padded, own
from tests.tolerance import close

LENGTHS = (31, 18, 6)
ROWS = [random_ids(1, length, seed=length)[0] for length in LENGTHS]


def alone(model: Model, plan: Plan | None, protocol: str, chunks: list[int]) -> list[torch.Tensor]:
    """Logits of each sequence by itself, fed in the chunks of the batch less the padding."""
    outs = []
    for row in ROWS:
        padding, rest = LENGTHS[0] - len(row), []
        for chunk in chunks:
            rest.append(max(0, chunk - padding))
            padding = max(0, padding - chunk)
        cache = SegmentCache(model, plan, protocol=protocol)
        outs.append(feed(model, cache, row[None], [chunk for chunk in rest if chunk])[0])
    return outs


@pytest.mark.parametrize("protocol", ["official", "strict"])
@places([None, *TINY])
def test_left_padding(case: str | None, protocol: str, model: Model) -> None:
    plan = None
    if case is not None:
        model, plan = on(case, model)
        only(protocol == "official" or not across(plan), "layers are written as one")
    ids, mask = left_padded(ROWS)
    chunks = [26, *[1] * 4, 1]
    together = feed(model, SegmentCache(model, plan, protocol=protocol), ids, chunks, mask=mask)
    for index, expected in enumerate(alone(model, plan, protocol, chunks)):
        close(together[index, -LENGTHS[index] :], expected, torch.float32)


@pytest.mark.parametrize("chunks", [[8, 10, 13], [3, 20, *[1] * 8]], ids=str)
def test_padding_longer_than_a_chunk(chunks: list[int], any_model: Model) -> None:
    plan = ragged(any_model, seed=7)
    ids, mask = left_padded(ROWS)
    together = feed(any_model, SegmentCache(any_model, plan, protocol="strict"), ids, chunks, mask=mask)
    for index, expected in enumerate(alone(any_model, plan, "strict", [LENGTHS[0]])):
        close(together[index, -LENGTHS[index] :], expected)


@pytest.mark.parametrize("case", TINY)
def test_rows_can_be_selected_and_repeated(case: str, llama: Model) -> None:
    only(not per_row(tiny(case, "llama")), "rows hold different numbers of entries, and say so")
    llama, plan = on(case, llama)
    ids = random_ids(3, 24, seed=8)
    order = torch.tensor([2, 0, 0, 1, 1, 2])
    cache = SegmentCache(llama, plan)
    feed(llama, cache, ids[:, :20], [20])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 0, 1, 2, 3, 5]))
    with llama.served(), torch.no_grad():
        after = [llama.network(input_ids=ids[order, at : at + 1], past_key_values=cache).logits for at in range(20, 24)]
    expected = feed(llama, SegmentCache(llama, plan), ids, [20, 1, 1, 1, 1])[:, 20:]
    close(torch.cat(after, dim=1), expected[order], torch.float32)


def expanded(model: Model) -> Model:
    """The same function as a multi-head model: every KV head copied to each of its query heads."""
    g = model.geometry
    config = type(model.network.config)(**{**model.network.config.to_dict(), "num_key_value_heads": g.query_heads})
    weights = model.network.state_dict()
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        weights[name] = weights[name].unflatten(0, (g.kv_heads, -1)).repeat_interleave(g.group, 0).flatten(0, 1)
    network = LlamaForCausalLM(config).eval().requires_grad_(False).to(model.dtype)
    network.load_state_dict(weights)
    return Model(network, None, "expanded")


def _copied(store: Store, group: int) -> Store:
    kv_heads = store.index.shape[1]
    copies = [head for head in range(kv_heads) for _ in range(group)]
    sides = {
        side: tuple(e if e.mixes else e.heads(copies, kv_heads) for e in getattr(store, side))
        for side in ("keys", "values")
    }
    older = None if store.older is None else _copied(store.older, group)
    return dataclasses.replace(store, index=store.index.repeat_interleave(group, 1), older=older, **sides)


def copied(plan: Plan, model: Model, group: int) -> Plan:
    """The plan with every KV head's decision given to each of its copies."""
    slots: dict[str, Any] = {}
    if plan.keep is not None:
        names = ("sink", "recent", "compensate")
        slots["keep"] = dataclasses.replace(
            plan.keep, **{name: getattr(plan.keep, name).repeat_interleave(group, 1) for name in names}
        )
    if plan.store is not None:
        slots["store"] = _copied(plan.store, group)
    if plan.keep is not None and plan.keep.select is not None:
        budget = plan.keep.select.budget.repeat_interleave(group, 1)
        slots["keep"] = dataclasses.replace(slots["keep"], select=dataclasses.replace(plan.keep.select, budget=budget))
    return dataclasses.replace(plan, model=model.fingerprint, **slots)


@pytest.mark.parametrize("case", TINY)
def test_shared_kv_heads_equal_copies(case: str, llama: Model) -> None:
    only(not looks_at_queries(case), "a KV head decides by its own queries")
    llama, plan = on(case, llama)
    joined = plan.store is not None and any(each.joined > 1 for each in (*plan.store.keys, *plan.store.values))
    only(not joined, "a basis of all heads together is made for as many heads")
    many, ids = expanded(llama), random_ids(2, 30, seed=9)
    close(own(many, ids), own(llama, ids), torch.float32)
    same_plan = copied(plan, many, llama.geometry.group)
    chunks = [15, 6, *[1] * 9]
    shared = feed(llama, SegmentCache(llama, plan), ids, chunks)
    close(feed(many, SegmentCache(many, same_plan), ids, chunks), shared, torch.float32)
