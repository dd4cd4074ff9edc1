"""The laws over every kind of coded segment, with stores that no method makes (`stores.py`).

In fp64, where cache and reference must agree so closely that codes cannot fall on different sides of a rounding
border; kernels, which compute in fp32, are held to the decoded entries in `tests/cache/store/test_coded.py`.
"""

from __future__ import annotations

import functools

import pytest
import torch

from kvtool import plan as plans
from kvtool.cache.bulk import Bulk
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.store.coded import Coded
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import ragged
from tests.laws.reference import dense
from tests.laws.stores import NAMES, PAIRED, stored
from tests.laws.test_bytes import grown
from tests.models import random_ids
from tests.running import feed, left_padded, own
from tests.tolerance import close, error, same

IDS = random_ids(1, 34, seed=2)
CHUNKS = [14, 9, *[1] * 6, 5]
CASES = [("llama", name) for name in [*NAMES, *PAIRED]]
CASES += [
    (model, name)
    for model in ("qwen3", "gemma3", "gpt-neox", "mistral")
    for name in ("two-bits", "before-rope", "mixed")
]
CASES += [(name, "before-rope") for name in ("rope-yarn", "cohere")] + [("gemma2", "two-bits"), ("gpt-neox", "joined")]
EACH = pytest.mark.parametrize(("architecture", "name"), CASES)


def both(model: Model, made: Plan, ids: torch.Tensor, chunks: list[int], protocol: str = "strict") -> torch.Tensor:
    return feed(model, SegmentCache(model, made, protocol=protocol), ids, chunks)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["official", "strict"])
@EACH
def test_the_dense_reference(architecture: str, name: str, protocol: str) -> None:
    model = models.double(architecture)
    made = stored(model, name)
    expected = dense(model, IDS[0], made, CHUNKS, strict=protocol == "strict")
    close(both(model, made, IDS, CHUNKS, protocol)[0], expected, torch.float32)
    assert error(expected, own(model, IDS)[0]) > 1e-3  # or this test could not fail


@pytest.mark.parametrize("chunks", [[34], [9, 13, 12], [1] * 34], ids=str)
@EACH
def test_strict_prefill_is_decode(architecture: str, name: str, chunks: list[int]) -> None:
    model = models.double(architecture)
    made = stored(model, name)
    close(both(model, made, IDS, chunks), decoded(architecture, name), torch.float32)


@functools.cache
def decoded(architecture: str, name: str) -> torch.Tensor:
    model = models.double(architecture)
    return both(model, stored(model, name), IDS, [5, 3, *[1] * 26])


@EACH
def test_left_padding(architecture: str, name: str) -> None:
    model = models.double(architecture)
    made, rows = stored(model, name), [random_ids(1, length, seed=length)[0] for length in (31, 18, 6)]
    ids, mask = left_padded(rows)
    cache = SegmentCache(model, made, protocol="strict")
    together = feed(model, cache, ids, [26, *[1] * 5], mask=mask)
    for index, row in enumerate(rows):
        close(together[index, -len(row) :], both(model, made, row[None], [len(row)])[0], torch.float32)


@pytest.mark.parametrize("tokens", [1 + 3 + 8 * n + beyond for n in (1, 2) for beyond in (-1, 0, 1)])
@pytest.mark.parametrize("name", ["two-bits", "before-rope", "residuals"])
def test_flush_boundaries(name: str, tokens: int) -> None:
    """One entry before a block moves, as it moves, and after."""
    model = models.double("llama")
    ids, made = random_ids(1, tokens + 2, seed=tokens), stored(model, name)
    expected = dense(model, ids[0], made, [1] * (tokens + 2), strict=True)
    close(both(model, made, ids, [1] * (tokens + 2))[0], expected, torch.float32)
    cache = SegmentCache(model, made)
    feed(model, cache, ids[:, :tokens], [tokens])
    lane = next(cache.segments[0].lanes())
    assert isinstance(lane, Bulk)
    assert lane.bulk.length == (tokens - 4) // 8 * 8
    assert (lane.sinks.length, lane.recent.length) == (1, tokens - 1 - lane.bulk.length)


@pytest.mark.parametrize("name", [*NAMES, *PAIRED])
def test_what_moved_is_never_written_again(name: str) -> None:
    model = models.double("llama")
    cache = SegmentCache(model, stored(model, name))
    ids = random_ids(2, 60, seed=9)
    feed(model, cache, ids[:, :30], [30])
    before = [
        {n: t.clone() for n, t in parts.items()}
        for lane in cache.segments[0].lanes()
        if isinstance(lane.bulk, Coded)
        for parts in lane.bulk.parts.values()
    ]
    with model.served(), torch.no_grad():
        for at in range(30, 60):
            model.network(input_ids=ids[:, at : at + 1], past_key_values=cache)
    after = [
        parts
        for lane in cache.segments[0].lanes()
        if isinstance(lane.bulk, Coded)
        for parts in lane.bulk.parts.values()
    ]
    assert before
    for old, new in zip(before, after, strict=True):
        for part, tensor in old.items():
            assert new[part].shape[2] > tensor.shape[2]
            same(new[part][:, :, : tensor.shape[2]], tensor)


@pytest.mark.parametrize(("architecture", "name"), [case for case in CASES if case[1] in ("before-rope", "joined")])
def test_moving_all_positions_changes_nothing(architecture: str, name: str) -> None:
    """What is stored before RoPE has the same codes wherever it stands."""
    model = models.double(architecture)
    made = stored(model, name)
    moved, still = (feed(model, SegmentCache(model, made), IDS, CHUNKS, shift=shift) for shift in (37, 0))
    close(moved, still, torch.float32)


@pytest.mark.parametrize("name", [name for name in [*NAMES, *PAIRED] if name != "mixed"])  # that copies its tables
def test_the_allocator_follows(name: str) -> None:
    model = models.shared("llama")
    both(model, stored(model, name), IDS, CHUNKS)  # Hadamard matrices are made once a process
    cache = SegmentCache(model, stored(model, name))
    assert grown(model, cache) == cache.nbytes
    held = [buffer for layer in cache.segments for lane in layer.lanes() for buffer in lane.buffers()]
    assert len({buffer.data_ptr() for buffer in held}) == len(held)
    assert all(buffer.untyped_storage().nbytes() == buffer.nbytes for buffer in held)


@pytest.mark.parametrize("name", [*NAMES, *PAIRED])
def test_a_store_and_windows(name: str) -> None:
    """Windowed heads stay raw, the others are coded; together they are the dense reference."""
    model = models.double("llama")
    keep = ragged(model, seed=3).keep
    made = stored(model, name, keep=keep)
    if name in PAIRED:
        with pytest.raises(InputError, match="across heads"):
            SegmentCache(model, made)
        return
    for protocol in ("official", "strict"):
        expected = dense(model, IDS[0], made, CHUNKS, strict=protocol == "strict")
        close(both(model, made, IDS, CHUNKS, protocol)[0], expected, torch.float32)


@pytest.mark.parametrize("name", [*NAMES, *PAIRED])
def test_round_trip(name: str, tmp_path) -> None:
    model = models.shared("llama")
    made = stored(model, name)
    read = plans.read(made.write(str(tmp_path / "plan")))
    same(both(model, read, IDS, CHUNKS), both(model, made, IDS, CHUNKS))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4], ids=str)
@pytest.mark.parametrize("name", [*NAMES, *PAIRED])
def test_zero_tiny_and_huge_keys(name: str, scale: float) -> None:
    model = models.build("llama")
    for layer in model.network.model.layers:
        layer.self_attn.k_proj.weight *= scale
    assert bool(torch.isfinite(both(model, stored(model, name), random_ids(2, 34), CHUNKS, "official")).all())


@pytest.mark.parametrize("name", [*NAMES, *PAIRED])
def test_constant_tokens(name: str) -> None:
    model = models.shared("llama")
    assert bool(torch.isfinite(both(model, stored(model, name), torch.full((1, 34), 5), CHUNKS, "official")).all())
