"""The trace: round trips, what it refuses, and that a written trace merges like the one in memory."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest

from kvtool import files, registry, trace
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.trace import Trace
from tests import models
from tests.corpora import corpora
from tests.laws import methods
from tests.statistics import observed
from tests.tolerance import same

NAMES = tuple(registry.names("statistics"))


@functools.cache
def made(name: str = "llama") -> Trace:
    return methods.trace(models.shared(name), NAMES)


def equal(first: Trace, second: Trace) -> None:
    for name in ("model", "source", "corpora", "done", "complete"):
        assert getattr(first, name) == getattr(second, name)
    assert first.statistics.keys() == second.statistics.keys()
    for which, statistic in first.statistics.items():
        assert type(second[which]) is type(statistic)
        assert second[which].state.keys() == statistic.state.keys()
        for key, tensor in statistic.state.items():
            same(second[which][key], tensor)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    equal(trace.read(made(name).write(str(tmp_path / "trace"))), made(name))


def test_a_written_trace_merges_like_the_one_in_memory(tmp_path: Path, llama: Model) -> None:
    other = observed.trace(llama, corpora(llama, seed=9))
    expected = copy.deepcopy(made())
    expected.merge(other)
    read = trace.read(made().write(str(tmp_path / "trace")))
    read.merge(trace.read(other.write(str(tmp_path / "other"))))
    equal(read, expected)


def test_the_samples_seen_and_the_corpora_are_on_record() -> None:
    recorded = made()
    assert {kind: len(done) for kind, done in recorded.done.items()} == {"text": 3, "needle": 3, "repeat": 2}
    assert [part["kind"] for parts in recorded.corpora.values() for part in parts] == list(recorded.corpora)


def test_a_missing_statistic_is_named() -> None:
    with pytest.raises(InputError, match="--stat gram"):
        Trace({}).need("gram")
    with pytest.raises(InputError, match="Did you mean 'retrieval'"):
        trace.statistic("retreival")


@pytest.mark.parametrize("what", ["model", "statistics", "done", "tensor", "geometry", "unknown"])
def test_damaged(what: str, tmp_path: Path) -> None:
    header, tensors = files.read(made().write(str(tmp_path / "trace")))
    if what == "tensor":
        del tensors["gram/v"]
    elif what == "geometry":
        del header["model"]["head_dim"]
    elif what == "unknown":
        header["statistics"].append("phlogiston")
    else:
        del header[what]
    files.write(tmp_path / "trace", header, tensors, force=True)
    with pytest.raises(InputError):
        trace.read(str(tmp_path / "trace"))


def test_accumulators_of_other_shapes_are_refused(tmp_path: Path) -> None:
    header, tensors = files.read(made().write(str(tmp_path / "trace")))
    tensors["gram/v"] = tensors["gram/v"][:, :3]
    files.write(tmp_path / "trace", header, tensors, force=True)
    with pytest.raises(InputError):
        trace.read(str(tmp_path / "trace"))


def test_another_kind_and_schema(tmp_path: Path) -> None:
    files.write(tmp_path / "plan", {"kind": "plan", "schema": 1}, {})
    with pytest.raises(InputError, match="got a plan, expected a trace"):
        trace.read(str(tmp_path / "plan"))
    files.write(tmp_path / "later", {"kind": "trace", "schema": 99}, {})
    with pytest.raises(InputError, match="another schema version"):
        trace.read(str(tmp_path / "later"))
