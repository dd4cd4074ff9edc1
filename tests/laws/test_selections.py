"""The laws over every kind of selection, with plans that no method makes (`selections.py`).

In fp64, where cache and reference must agree so closely that scores cannot change places.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from kvtool import plan as plans
from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Store
from tests import models
from tests.laws.reference import dense
from tests.laws.selecting import Selecting
from tests.laws.selections import CASES, NOISY, selecting
from tests.laws.stores import stored
from tests.laws.test_bytes import grown
from tests.models import random_ids
from tests.running import feed, left_padded, own
from tests.statistics.naive import written_down
from tests.tolerance import close, error, same

PROMPT = 20
IDS = random_ids(1, 30, seed=2)
CHUNKS = [12, 8, *[1] * 5, 3, 1, 1]
RAGGED = ["layer", "mass", "least", "layer-mass", "mass-alike", "step-layer"]
EACH = pytest.mark.parametrize("name", CASES)


def run(model: Model, made: Plan, ids: torch.Tensor, chunks: list[int], **options) -> torch.Tensor:
    return feed(model, SegmentCache(model, made, prompt_length=PROMPT), ids, chunks, **options)


def reach(made: Plan) -> torch.Tensor:
    """The entries that each head may hold after a prompt of PROMPT tokens, [L,K]."""
    assert made.keep is not None
    assert made.keep.select is not None
    budget = made.keep.select.budget
    return torch.where(budget <= 1, (budget * PROMPT).round(), budget)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOISY])
def test_the_dense_reference(name: str) -> None:
    model = models.double("llama")
    made = selecting(model, name)
    expected = dense(model, IDS[0], made, CHUNKS, prompt_length=PROMPT)
    close(run(model, made, IDS, CHUNKS)[0], expected, torch.float32)
    assert error(expected, own(model, IDS)[0]) > 1e-2  # or this test could not fail


@pytest.mark.parametrize("name", ["floor", "step-sum", "step-reindex", "chunk-reindex", "merge-count"])
@pytest.mark.parametrize("architecture", ["gemma2", "rope-yarn", "cohere", "gpt-neox"])
def test_the_dense_reference_in_other_architectures(architecture: str, name: str) -> None:
    model = models.double(architecture)
    made = selecting(model, name)
    expected = dense(model, IDS[0], made, CHUNKS, prompt_length=PROMPT)
    close(run(model, made, IDS, CHUNKS)[0], expected, torch.float32)


@pytest.mark.parametrize("name", ["step-sum", "step-newest", "step-merge", "step-reindex"])
def test_a_strict_chunk_is_so_many_steps(name: str) -> None:
    model = models.double("llama")
    made, chunks = selecting(model, name), [20, 1, 9]
    expected = dense(model, IDS[0], made, chunks, strict=True)
    close(feed(model, SegmentCache(model, made, protocol="strict"), IDS, chunks)[0], expected, torch.float32)
    close(run(model, made, IDS, [20, *[1] * 10])[0], expected, torch.float32)


@pytest.mark.parametrize("name", [*NOISY, *RAGGED, "probes", "alike", "step-sum", "step-merge", "chunk", "chunk-merge",
                                  "merge-some", "reindex", "step-reindex"])  # fmt: skip
def test_left_padding(name: str) -> None:
    """Each row as alone. Shares of a prompt that goes in chunks are of the batch's prompt; so are counts here."""
    model = models.double("llama")
    made = selecting(model, name, **({"share": (6.0, 5.0, 7.0)} if "chunk" in name else {}))
    rows = [random_ids(1, length, seed=length)[0] for length in (27, 18, 13)]
    ids, mask = left_padded(rows)
    together = feed(model, SegmentCache(model, made), ids, [22, *[1] * 5], mask=mask)
    for index, row in enumerate(rows):
        alone = feed(model, SegmentCache(model, made), row[None], [len(row) - 5, *[1] * 5])
        close(together[index, -len(row) :], alone[0], torch.float32)


@EACH
def test_a_budget_that_suffices_changes_nothing(name: str) -> None:
    model = models.double("llama")
    made = selecting(model, name, share=(60.0,) * 3, mass=0.0, least=0.0)
    close(run(model, made, IDS, CHUNKS), own(model, IDS), torch.float32)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("step") or name in (*RAGGED, "last")])
def test_held_entries_and_bytes_stay_within_the_budget(name: str) -> None:
    model = models.double("llama")
    made = selecting(model, name)
    cache, ids = SegmentCache(model, made, prompt_length=PROMPT), random_ids(2, 50, seed=4)
    limit, whole = reach(made), 2 * 8 * 8 * 2
    spec = made.keep.select
    pooled = spec.spread == "layer"
    with model.served(), torch.no_grad():
        model.network(input_ids=ids[:, :PROMPT], past_key_values=cache)
        for at in range(PROMPT, 50):
            model.network(input_ids=ids[:, at : at + 1], past_key_values=cache)
            grew = 0 if spec.when == "step" else at + 1 - PROMPT
            held = cache.entries()
            if pooled:
                assert (held.sum(1) <= limit.sum(1) + 2 * grew + 1).all()
            elif spec.growing:
                assert (held <= spec.budget * (at + 1) + 1).all()
            else:
                assert (held <= limit + grew).all()
            if spec.when == "step" and not spec.growing:  # entries, scores and counts of two rows, queries or outputs
                # room in buffers: `limit` are held, and a newcomer is attended to before one of them leaves
                spare = held.numel() * (64 if spec.slack else 1)
                queries = (spec.history + (spec.score == "hybrid")) * model.geometry.query_heads * model.geometry.layers
                assert cache.nbytes <= (int(limit.sum()) + spare + queries + 3) * (whole + 32)


SOME = ["probes", "mass-alike", "step-layer", "step-merge", "chunk-merge", "step-reindex"]


@pytest.mark.parametrize("name", SOME)
def test_the_allocator_follows(name: str) -> None:
    model = models.shared("llama")
    cache = SegmentCache(model, selecting(model, name, share=()), prompt_length=40)
    assert grown(model, cache) == cache.nbytes
    gc.collect()


@pytest.mark.parametrize("name", [*NOISY, *SOME])
def test_round_trip_and_determinism(name: str, tmp_path) -> None:
    model = models.shared("llama")
    made = selecting(model, name)
    read = plans.read(made.write(str(tmp_path / "plan")))
    same(run(model, read, IDS, CHUNKS), run(model, made, IDS, CHUNKS))


@pytest.mark.parametrize("name", ["last", "norms", "floor", "mass", "step-sum", "merge-count", "reindex"])
def test_layers_that_let_go_one_by_one_hold_the_same(name: str) -> None:
    """With the prompt's length known, a layer is thinned before the next one is fed."""
    model, made = models.double("llama"), selecting(models.double("llama"), name)
    most, caches = [0, 0], [SegmentCache(model, made), SegmentCache(model, made, prompt_length=PROMPT)]
    outs = []
    for number, cache in enumerate(caches):

        def watch(*_, number: int = number, cache: SegmentCache = cache) -> None:
            if cache.get_seq_length() == PROMPT:
                most[number] = max(most[number], cache.nbytes)

        hooks = [layer.register_forward_hook(watch) for layer in model.network.model.layers]
        outs.append(feed(model, cache, IDS, [PROMPT, *[1] * 10]))
        for hook in hooks:
            hook.remove()
    same(outs[0], outs[1])
    same(caches[0].entries(), caches[1].entries())
    assert most[1] < most[0]


@pytest.mark.parametrize("prompt", [40, 200])
def test_prefill_in_chunks_stays_within_budget_and_chunk(prompt: int) -> None:
    model = models.shared("llama")
    cache = SegmentCache(model, selecting(model, "chunk", share=(16.0,) * 3))
    ids = random_ids(1, prompt, seed=6)
    with model.served(), torch.no_grad():
        for at in range(0, prompt, 8):
            model.network(input_ids=ids[:, at : at + 8], past_key_values=cache)
            assert int(cache.entries().max()) <= 16
            assert at < 16 or cache.nbytes <= 3 * 2 * 16 * (2 * 8 * 4 + 4)  # keys, values and scores


@pytest.mark.parametrize("name", ["step-sum", "step-newest", "step-decay", "step-layer", "step-pooled"])
def test_every_step_holds_what_the_definition_holds(name: str) -> None:
    """In the first layer, whose queries, keys and values depend on the tokens alone."""
    model = models.double("llama")
    made, full = selecting(model, name), SegmentCache(model)
    full.segments[0].record = -1
    feed(model, full, IDS, [30])
    k, v, _ = next(full.segments[0].lanes()).recall()
    q = torch.cat(full.segments[0].queries, dim=2)
    definition = Selecting(made.keep.select, 0, q[0], k[0], v[0], full.segments[0].scale, None, None)
    seen = definition.run([(0, PROMPT), *[(row, 1) for row in range(PROMPT, 30)]], PROMPT, PROMPT)
    cache = SegmentCache(model, made)
    with model.served(), torch.no_grad():
        model.network(input_ids=IDS[:, :PROMPT], past_key_values=cache)
        for row in range(PROMPT, 29):
            model.network(input_ids=IDS[:, row : row + 1], past_key_values=cache)
            for lane in cache.segments[0].lanes():
                for at, head in enumerate(lane.heads):
                    apart = (lane.recall()[0][0, at][:, None] - k[0, head]).abs().amax(-1)
                    held = (apart < 1e-9).nonzero()[:, 1].tolist()
                    assert held == [entry.row for entry in seen[head, row + 1][:-1]]


def test_a_share_of_an_unknown_prompt_is_refused() -> None:
    model = models.shared("llama")
    with pytest.raises(InputError, match="share of a prompt"):
        SegmentCache(model, selecting(model, "chunk-newest"))


@pytest.mark.parametrize("name", RAGGED)
def test_rows_of_a_batch_hold_entries_of_their_own(name: str) -> None:
    model = models.double("llama")
    cache = SegmentCache(model, selecting(model, name, share=(0.9, 0.9, 0.9)))
    feed(model, cache, random_ids(3, 22, seed=5), [20, 1, 1])
    assert [part.rows for part in cache.segments[0].parts] == [[0], [1], [2]]
    sizes = [[lane.entries() for layer in cache.segments for lane in layer.parts[row].lanes] for row in range(3)]
    assert sizes[0] != sizes[1] != sizes[2]


def test_a_budget_of_the_model_goes_to_the_best_scores_of_all_layers() -> None:
    model = models.double("llama")
    cache = SegmentCache(model, selecting(model, "layer", spread="model", observed=4, recent=0, sink=0))
    feed(model, cache, IDS[:, :PROMPT], [PROMPT])
    step = Step(0, cache.segments[0].scale)
    rows = [lane.selector.scores(lane.view(step))[0, 0] for layer in cache.segments for lane in layer.lanes()]
    border = torch.stack(rows).flatten().sort(descending=True).values[6 * 8]
    cache.finish()
    assert int(cache.entries().sum()) == 6 * 8
    same(cache.entries().flatten(), torch.stack([(row > border).sum().clamp_min(1) for row in rows]))


@pytest.mark.parametrize("name", ["layer", "chunk", "merge", "reindex", "alike", "least"])
@pytest.mark.parametrize("store", ["two-bits", "before-rope", "joined"])
def test_a_store_of_what_was_selected(store: str, name: str) -> None:
    """Coding after selection is the selection, coded: with a lossless window nothing but the order of sums differs."""
    model = models.double("llama")
    keep = selecting(model, name).keep
    made = stored(model, store, keep=keep, recent=60)
    if store == "joined" and name != "alike":
        with pytest.raises(InputError, match="each head keeps entries of its own"):
            SegmentCache(model, made)
        return
    close(run(model, made, IDS, CHUNKS), run(model, selecting(model, name), IDS, CHUNKS), torch.float32)
    made = stored(model, store, keep=keep, recent=2, block=8)
    cache = SegmentCache(model, made, prompt_length=PROMPT)
    assert bool(torch.isfinite(feed(model, cache, IDS, CHUNKS)).all())
    assert any(lane.bulk.length for layer in cache.segments for lane in layer.lanes())


@pytest.mark.parametrize("name", ["last", "layer", "chunk", "merge", "reindex", "chunk-reindex"])
def test_keys_that_are_turned_back_know_where_they_stand(name: str) -> None:
    """Stored before RoPE, without rounding: the same as not stored."""
    model = models.double("llama")
    made = selecting(model, name)
    store = Store((Encoding(rotated=False),), (Encoding(),), torch.zeros(3, 2).int(), recent=2, block=2)
    cache, full = SegmentCache(model, replace(made, store=store), prompt_length=PROMPT), SegmentCache(model)
    close(feed(model, cache, IDS, CHUNKS), run(model, made, IDS, CHUNKS), torch.float32)
    if name in ("last", "layer", "chunk"):
        feed(model, full, IDS, CHUNKS)
        k, _, _ = next(full.segments[0].lanes()).recall()
        for lane in cache.segments[0].lanes():
            stood = k[:, lane.heads].gather(2, lane.positions[..., None].expand(-1, -1, -1, 8))
            close(lane.recall()[0], stood, torch.float32)


def test_counts_meet_neither_stores_nor_reads() -> None:
    model = models.double("llama")
    with pytest.raises(InputError, match="stand for several"):
        SegmentCache(model, stored(model, "two-bits", keep=selecting(model, "neighbours").keep))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("pool", ["none", "mean"])
def test_an_answer_that_is_told_scores_the_prompt(architecture: str, pool: str) -> None:
    """By definition: one plain forward of prompt and answer, in which the answer's rows are written out."""
    model = models.double(architecture)
    made = selecting(model, "last", observe="answer", pool=pool, kernel=3, recent=3, sink=1)
    cache, ids = SegmentCache(model, made), random_ids(2, 30, seed=8)
    cache.tell(ids[:, PROMPT:])
    feed(model, cache, ids[:, :PROMPT], [PROMPT])
    cache.finish()
    group = model.geometry.group
    full = SegmentCache(model)
    feed(model, full, ids[:, :PROMPT], [PROMPT])
    for row in range(2):
        for layer, seen in enumerate(written_down(model, ids[row])):
            paid = seen.weights[:, PROMPT:, :PROMPT].double().mean(1)  # no answer's row is masked in the prompt
            if pool == "mean":
                padded = torch.nn.functional.pad(paid, (1, 1))
                paid = sum(padded[:, at : at + PROMPT] for at in range(3)) / 3
            scores = paid.unflatten(0, (-1, group)).mean(1)
            held = next(full.segments[layer].lanes()).recall()[0][row]
            for lane in cache.segments[layer].lanes():
                for at, head in enumerate(lane.heads):
                    budget = int(reach(made)[layer, head])
                    best = 1 + scores[head, 1 : PROMPT - 3].argsort(descending=True)[: budget - 4]
                    stays = sorted([0, *best.tolist(), *range(PROMPT - 3, PROMPT)])
                    same(lane.recall()[0][row, at], held[head, stays])


def test_an_answer_told_to_rows_with_padding_and_to_a_cache_that_adopts() -> None:
    model = models.double("llama")
    made = selecting(model, "last", observe="answer")
    rows = [random_ids(1, length, seed=length)[0] for length in (27, 18)]
    ids, mask = left_padded(rows)
    together = SegmentCache(model, made)
    together.tell(ids[:, 22:])
    out = feed(model, together, ids, [22, *[1] * 5], mask=mask)
    for index, row in enumerate(rows):
        full, alone = SegmentCache(model), SegmentCache(model, made)
        full.record_for(made)
        feed(model, full, row[None, :-5], [len(row) - 5])
        alone.tell(row[None, -5:])
        alone.adopt(full)
        with model.served(), torch.no_grad():
            steps = [model.network(input_ids=t, past_key_values=alone).logits for t in row[None, -5:].split(1, 1)]
        close(out[index, -5:], torch.cat(steps, dim=1)[0], torch.float32)


def test_an_answer_that_nobody_told_is_refused() -> None:
    model = models.shared("llama")
    cache = SegmentCache(model, selecting(model, "last", observe="answer"))
    with pytest.raises(InputError, match="what the answer is"):
        feed(model, cache, IDS, [PROMPT, *[1] * 10])
