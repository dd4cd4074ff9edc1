"""The laws over every kind of reading (`readings.py`), against the definition in `reading.py`.

In fp64, where cache and reference agree so closely that they rank units alike.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from kvtool import plan as plans
from kvtool.cache.segment_cache import SegmentCache
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep, Read, Select
from tests import models
from tests.laws.methods import ragged
from tests.laws.readings import CASES, reading
from tests.laws.reference import dense
from tests.laws.stores import stored
from tests.laws.test_bytes import grown
from tests.models import random_ids
from tests.running import feed, left_padded, own
from tests.tolerance import close, error, same

IDS = random_ids(1, 32, seed=2)
CHUNKS = [13, 6, *[1] * 6, 2, *[1] * 5]
PLACES = [("llama", name) for name in CASES]
PLACES += [(model, name) for model in ("gemma2", "gemma3", "gpt-neox") for name in ("wave", "own-jumps", "segments")]
EACH = pytest.mark.parametrize(("architecture", "name"), PLACES)


def fed(model: Model, made: Plan, ids: torch.Tensor, chunks: list[int], protocol: str = "official") -> torch.Tensor:
    return feed(model, SegmentCache(model, made, protocol=protocol), ids, chunks)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["official", "strict"])
@EACH
def test_the_dense_reference(architecture: str, name: str, protocol: str) -> None:
    """Under the strict protocol it knows of no chunks: prefill is decode."""
    model = models.double(architecture)
    made = reading(model, name)
    expected = dense(model, IDS[0], made, CHUNKS, strict=protocol == "strict")
    close(fed(model, made, IDS, CHUNKS, protocol)[0], expected, torch.float32)
    assert error(expected, own(model, IDS)[0]) > 1e-2  # or this test could not fail


@pytest.mark.parametrize("name", CASES)
def test_a_budget_of_everything_is_dense(name: str) -> None:
    model = models.shared("llama")
    made = reading(model, name)
    assert made.read is not None
    made = replace(made, read=replace(made.read, budget=torch.full((3,), 1e6)))
    close(fed(model, made, IDS, CHUNKS), own(model, IDS))


@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_see_each_other(name: str) -> None:
    """Nor their padding: every row, whose choices fall due at steps of its own, is what it is alone."""
    model = models.double("llama")
    made, rows = reading(model, name), [random_ids(1, length, seed=at)[0] for at, length in enumerate((27, 27, 16, 6))]
    ids, mask = left_padded(rows)
    cache = SegmentCache(model, made)
    together = feed(model, cache, ids, [15, 5, *[1] * 7], mask=mask)
    for index, row in enumerate(rows):
        prompt, padding, chunks = [15, 5], 27 - len(row), []
        for chunk in prompt:
            chunks += [chunk - padding] if chunk > padding else []
            padding = max(0, padding - chunk)
        alone = fed(model, made, row[None], [*chunks, *[1] * (len(row) - sum(chunks))])
        close(together[index, -len(row) :], alone[0], torch.float32)
    boards = {id(lane.reader.place.board): lane.reader.place.board for lane in _readers(cache)}
    assert len(boards) == 1
    assert not next(iter(boards.values())).posts  # nothing waits for a layer that never asks


def _readers(cache: SegmentCache) -> list:
    return [lane for layer in cache.segments for lane in layer.lanes() if getattr(lane, "reader", None) is not None]


@pytest.mark.parametrize("name", CASES)
def test_rows_can_be_selected_and_repeated(name: str) -> None:
    model = models.double("llama")
    made, ids, order = reading(model, name), random_ids(3, 30, seed=8), torch.tensor([2, 0, 0, 1, 1, 2])
    cache = SegmentCache(model, made)
    feed(model, cache, ids[:, :25], [20, *[1] * 5])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 0, 1, 2, 3, 5]))
    with model.served(), torch.no_grad():
        after = [model.network(input_ids=ids[order, at : at + 1], past_key_values=cache).logits for at in range(25, 30)]
    expected = fed(model, made, ids, [20, *[1] * 10])[:, 25:]
    close(torch.cat(after, dim=1), expected[order], torch.float32)


@pytest.mark.parametrize("store", ["two-bits", "before-rope", "joined", "mixed"])
@pytest.mark.parametrize(
    ("name", "unit"),
    [("minmax", 4), ("minmax", 8), ("own-jumps", 8), ("wave", 8), ("followed", 8), ("slow", 8), ("segments", 4)],
)
def test_a_coded_bulk(name: str, unit: int, store: str) -> None:
    """Summaries are of entries as they came; what is read is what the store gives back, by whole blocks or not."""
    model = models.double("llama")
    made = reading(model, name)
    assert made.read is not None
    made = replace(made, read=replace(made.read, unit=unit), store=stored(model, store).store)
    expected = dense(model, IDS[0], made, CHUNKS)
    close(fed(model, made, IDS, CHUNKS)[0], expected, torch.float32)


@pytest.mark.parametrize("name", ["minmax", "tokens", "own-jumps", "wave", "rest", "sentences", "alike", "segments",
                                  "asked-mean"])  # fmt: skip
def test_what_a_window_or_a_selection_leaves(name: str) -> None:
    model = models.double("llama")
    nothing = torch.zeros(3, 2)
    everything = Keep(nothing.int(), nothing.int() - 1, nothing.to(torch.uint8))
    select = Select(torch.full((3, 2), 0.8), observed=4, spread="layer")
    for keep in (ragged(model, seed=3).keep, replace(everything, select=select)):
        made = replace(reading(model, name), keep=keep)
        close(fed(model, made, IDS, CHUNKS)[0], dense(model, IDS[0], made, CHUNKS), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_allocator_follows(name: str) -> None:
    model = models.shared("llama")
    cache = SegmentCache(model, reading(model, name, share=0.2))
    assert grown(model, cache) == cache.nbytes
    held = [buffer for layer in cache.segments for lane in layer.lanes() for buffer in lane.buffers()]
    assert len({buffer.data_ptr() for buffer in held}) == len(held)
    assert all(buffer.untyped_storage().nbytes() == buffer.nbytes for buffer in held)


@pytest.mark.parametrize("name", ["channels", "low-rank", "followed", "own-jumps", "sentences", "segments"])
def test_round_trip(name: str, tmp_path) -> None:
    model = models.shared("llama")
    made = reading(model, name)
    same(fed(model, plans.read(made.write(str(tmp_path / "plan"))), IDS, CHUNKS), fed(model, made, IDS, CHUNKS))


@functools.cache
def scaled(scale: float) -> Model:
    model = models.build("llama")
    for layer in model.network.model.layers:
        layer.self_attn.k_proj.weight *= scale
    return model


@pytest.mark.parametrize("scale", [0.0, 1e4], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_zero_and_huge_keys(name: str, scale: float) -> None:
    model = scaled(scale)
    assert bool(torch.isfinite(fed(model, reading(model, name), IDS, [26, *[1] * 6])).all())


def test_owners_that_do_not_hold_what_their_followers_hold_are_refused() -> None:
    model = models.shared("llama")
    with pytest.raises(InputError, match="another layer chooses"):
        SegmentCache(model, replace(reading(model, "followed"), keep=ragged(model).keep))


@pytest.mark.parametrize("owner", [[0, 2, 2], [0, 0, 1]], ids=str)
def test_owners_must_come_first_and_choose_by_themselves(owner: list[int]) -> None:
    with pytest.raises(InputError, match="bad owners"):
        Read(torch.full((3,), 0.5), owner=torch.tensor(owner).int())
