"""A cache that was saved and loaded goes on as if nothing had happened, bit for bit, whatever the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvtool import snapshot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.documents import after
from kvtool.cache.share.documents import read as read_in
from kvtool.cache.state import dump
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan, read
from tests import models
from tests.laws.methods import TINY, on
from tests.laws.stores import NAMES, PAIRED, stored
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import same

PROMPT, CHUNKS = 57, (1, 1, 6, 1)
SHIFT = 3  # the position of the first token


def goes_on(model: Model, made: Plan | None, path: Path) -> None:
    plan = None if made is None else read(made.write(str(path.with_name("plan"))))  # a file's tensors are contiguous
    ids = random_ids(1, PROMPT + 1 + sum(CHUNKS), seed=11)
    saved = SegmentCache(model, plan, prompt_length=PROMPT)
    feed(model, saved, ids[:, : PROMPT + 1], [PROMPT, 1], shift=SHIFT)
    told = snapshot.save(str(path), model, saved, ids[0, : PROMPT + 1])
    assert (told.tokens, told.origin, told.held) == (PROMPT + 1, SHIFT, saved.nbytes)
    loaded = snapshot.load(str(path), model)
    assert loaded.nbytes <= saved.nbytes  # room to grow is not saved
    assert loaded.read_bytes == saved.read_bytes
    assert loaded.entries().tolist() == saved.entries().tolist()
    rest = ids[:, PROMPT + 1 :]
    after = [feed(model, cache, rest, list(CHUNKS), shift=PROMPT + 1 + SHIFT) for cache in (saved, loaded)]
    same(after[1], after[0])
    assert loaded.entries().tolist() == saved.entries().tolist()


@pytest.mark.parametrize("case", TINY)
def test_a_loaded_cache_goes_on(case: str, tmp_path: Path) -> None:
    name = ("llama", "gemma3")[TINY.index(case) % 2]
    model, plan = on(case, models.shared(name))
    goes_on(model, plan, tmp_path / "document.kv")


@pytest.mark.parametrize("name", [*NAMES, *PAIRED])
def test_every_codec_comes_back(name: str, tmp_path: Path) -> None:
    model = models.double("llama")
    goes_on(model, stored(model, name), tmp_path / "document.kv")


def test_the_full_cache(any_model: Model, tmp_path: Path) -> None:
    goes_on(any_model, None, tmp_path / "document.kv")


def test_nothing_that_a_lane_is_fed_with_is_left_out(llama: Model) -> None:
    """Planted: a part with an attribute of each kind."""

    class Part:
        def __init__(self) -> None:
            self.count, self.rows, self.table = 0, [torch.zeros(0)], {"a": None}
            self.rule = len

    Part.__module__ = "kvtool.cache.planted"
    assert dump(Part()).keys() == {"count", "rows", "table"}


def test_a_loaded_cache_is_a_prefix_for_many_rows(llama: Model, tmp_path: Path) -> None:
    ids = random_ids(1, PROMPT, seed=3)
    cache = SegmentCache(llama, stored(llama, "four-bits"))
    feed(llama, cache, ids, [PROMPT])
    snapshot.save(str(tmp_path / "document.kv"), llama, cache, ids[0])
    loaded = snapshot.load(str(tmp_path / "document.kv"), llama)
    rows = random_ids(3, 4, seed=4)
    both = [SegmentCache(llama, prefix.plan, prefix=prefix) for prefix in (cache, loaded)]
    same(*(feed(llama, made, rows, [1, 3], shift=PROMPT) for made in both))


@pytest.mark.parametrize("name", [None, "four-bits", "two-bits"])
def test_a_document_goes_on_after_its_prefix(name: str | None, tmp_path: Path) -> None:
    """The file has the document's own entries, and makes the prefix anew from its tokens."""
    model = models.double("llama")
    prefix, ids, rest = (random_ids(1, count, seed=count)[0] for count in (7, PROMPT, 6))
    plan = None if name is None else stored(model, name)
    saved = after(model, SegmentCache(model, plan), read_in(model, SegmentCache(model), prefix))
    read_in(model, saved, ids)
    path = str(tmp_path / "document.kv")
    told = snapshot.save(path, model, saved, ids, prefix=prefix)
    own = [snapshot.save(str(tmp_path / f"{at}"), model, read_in(model, SegmentCache(model), x), x) for at, x in
           enumerate((prefix, ids))]  # fmt: skip
    assert (told.origin, told.prefix, told.hash) == (7, own[0].hash, own[1].hash)
    assert len({told.identity, own[0].identity, own[1].identity}) == 3
    opened = snapshot.opened(path, model)
    assert opened.prefix.tolist() == prefix.tolist()
    assert opened.tokens.tolist() == ids.tolist()
    assert opened.cache.nbytes <= told.held < saved.nbytes
    loaded = snapshot.load(path, model)
    assert loaded.read_bytes == saved.read_bytes
    same(*(feed(model, cache, rest[None], [4, 1, 1], shift=7 + PROMPT) for cache in (loaded, saved)))


@pytest.mark.parametrize("wrong", ["none", "shorter"])
def test_another_prefix_is_not_saved(wrong: str, llama: Model, tmp_path: Path) -> None:
    prefix, ids = random_ids(1, 7)[0], random_ids(1, 9)[0]
    cache = read_in(llama, after(llama, SegmentCache(llama), read_in(llama, SegmentCache(llama), prefix)), ids)
    with pytest.raises(InputError, match="not the tokens"):
        snapshot.save(str(tmp_path / "document.kv"), llama, cache, ids, prefix=None if wrong == "none" else prefix[:3])


@pytest.mark.parametrize("wrong", ["tokens", "rows", "branch", "inserted"])
def test_what_is_not_one_whole_sequence_is_refused(wrong: str, llama: Model, tmp_path: Path) -> None:
    ids = random_ids(2 if wrong == "rows" else 1, 20)
    cache = SegmentCache(llama)
    feed(llama, cache, ids, [20])
    if wrong == "branch":
        cache = SegmentCache(llama, prefix=cache)
        feed(llama, cache, ids[:, :3], [3], shift=20)
    if wrong == "inserted":
        k = torch.zeros(1, llama.geometry.kv_heads, 2, llama.geometry.head_dim)
        cache.insert([(k, k)] * llama.geometry.layers)
    with pytest.raises(InputError, match="not the tokens" if wrong == "tokens" else "cannot be saved"):
        snapshot.save(str(tmp_path / "document.kv"), llama, cache, ids[0, : 19 if wrong == "tokens" else 20])
