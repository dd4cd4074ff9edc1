"""The plan: round trips, its bytes, and what it refuses."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool import files, plan, records
from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import Outliers
from kvtool.encoding.transforms import Scale
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan, compose
from kvtool.slots import EVERYTHING, Draft, Keep, Read, Select, Store
from tests import models
from tests.laws.methods import LOSSLESS, TINY, lossless, tiny
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import same

GOLDEN = "7e533e501a2652e8b2eda564ec5016d24dd11b18363e1dc1369046f1bd9e0261"


def small() -> Plan:
    """A plan of no model, with everything in it."""
    keep = Keep.heads(
        torch.tensor([[True, False], [False, False]]),
        sink=4,
        recent=16,
        compensate=True,
        recent_ratio=0.25,
        position="reindex",
        select=Select(
            torch.tensor([[0.5, 0.25], [0.125, 64.0]]),
            kernel=5,
            spread="layer",
            settings={"places": 25, "mode": "code"},
            tables={"mean": torch.ones(2, 2)},
        ),
    )
    scale, kept = Scale(torch.tensor([[2.0, 0.5]])), Outliers(1, "token", 32)
    key = Encoding(Affine(2, 32, "token"), (scale,), kept, rotated=False)
    store = Store((key,), (Encoding(),), torch.tensor([[0, -1], [-1, 0]]).int(), sink=4, recent=32)
    fingerprint = {"architecture": "none", "layers": 2, "kv_heads": 2, "windows": [None, 8], "weights": "0123"}
    evidence = {"score": torch.tensor([[1.0, 0.5], [0.25, 0.0]])}
    return Plan(
        "small", fingerprint, {"share": 0.5}, {"seed": 1}, keep, evidence,
        store=store, read=Read(torch.tensor([0.25, 1.0])), draft=Draft(3),
    )  # fmt: skip


def equal(first: Plan, second: Plan) -> None:
    for name in ("method", "model", "options", "provenance", "slots"):
        assert getattr(first, name) == getattr(second, name)
    assert first.evidence.keys() == second.evidence.keys()
    for name, array in first.evidence.items():
        same(second.evidence[name], array)
    for slot in plan.SLOTS:
        held: list[dict[str, torch.Tensor]] = [{}, {}]
        documents = [records.dump(getattr(p, slot), slot, t) for p, t in zip((first, second), held, strict=True)]
        assert documents[0] == documents[1]
        assert held[0].keys() == held[1].keys()
        for name, tensor in held[0].items():
            same(held[1][name], tensor)


@pytest.mark.parametrize("case", [*TINY, *LOSSLESS])
def test_round_trip(case: str, tmp_path: Path, llama: Model) -> None:
    made = tiny(case, llama.name) if case in TINY else lossless(case, llama.name)
    read = plan.read(made.write(str(tmp_path / "plan")))
    equal(read, made)
    ids = random_ids(1, 20)
    same(*(feed(llama, SegmentCache(llama, p, prompt_length=15), ids, [15, *[1] * 5]) for p in (made, read)))


def test_round_trip_of_every_field(tmp_path: Path) -> None:
    equal(plan.read(small().write(str(tmp_path / "plan"))), small())
    empty = Plan("nothing", {})
    equal(plan.read(empty.write(str(tmp_path / "empty"))), empty)


def test_the_bytes_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change here is a change of the format: once a version is released, raise `plan.SCHEMA` with it."""
    monkeypatch.setattr(files, "__version__", "0")
    assert plan.SCHEMA == 2
    payload = Path(small().write(str(tmp_path / "plan"))).read_bytes()
    assert hashlib.sha256(payload).hexdigest() == GOLDEN


def test_another_kind_and_schema(tmp_path: Path) -> None:
    files.write(tmp_path / "trace", {"kind": "trace", "schema": 1}, {})
    with pytest.raises(InputError, match="got a trace, expected a plan"):
        plan.read(str(tmp_path / "trace"))
    files.write(tmp_path / "later", {"kind": "plan", "schema": 3}, {})
    with pytest.raises(InputError, match="got 3, expected 2"):
        plan.read(str(tmp_path / "later"))


def change(header: dict[str, Any], tensors: dict[str, torch.Tensor], what: str) -> None:
    if what == "method":
        del header["method"]
    elif what == "slots":
        del header["slots"]
    elif what == "tensor":
        del tensors["keep.recent"]
    elif what == "field":
        header["slots"]["keep"]["colour"] = "red"
    elif what == "slot":
        header["slots"]["keep"] = [1]


@pytest.mark.parametrize("what", ["method", "slots", "tensor", "field", "slot"])
def test_damaged(what: str, tmp_path: Path) -> None:
    header, tensors = files.read(small().write(str(tmp_path / "plan")))
    change(header, tensors, what)
    files.write(tmp_path / "plan", header, tensors, force=True)
    with pytest.raises(InputError, match="damaged plan"):
        plan.read(str(tmp_path / "plan"))


@pytest.mark.parametrize("other", ["qwen3", "mha", "rope-linear", "gpt-neox"])
def test_another_model_is_refused(other: str, llama: Model) -> None:
    model = models.shared(other)
    with pytest.raises(InputError, match="made for another model"):
        SegmentCache(model, tiny("streaming-0", llama.name))


def test_other_weights_are_refused(llama: Model) -> None:
    with pytest.raises(InputError, match="weights"):
        SegmentCache(models.build("llama", seed=1), tiny("streaming-0", llama.name))


def test_the_same_weights_in_another_dtype_are_not(llama: Model) -> None:
    bf16, again = models.build("llama"), models.build("llama")
    bf16.network.to(torch.bfloat16)
    assert llama.fingerprint == bf16.fingerprint == again.fingerprint


def test_heads() -> None:
    full = torch.tensor([[True, False]])
    keep = Keep.heads(full, sink=3, recent=7, compensate=True)
    assert keep.sink.tolist() == [[0, 3]]
    assert keep.recent.tolist() == [[EVERYTHING, 7]]
    assert keep.compensate.tolist() == [[0, 1]]
    assert torch.equal(keep.full, full)
    assert not keep.lossless
    assert Keep.heads(torch.ones(2, 2), sink=1, recent=1).lossless
    for sink, recent in ((-1, 1), (0, 0)):
        with pytest.raises(InputError, match="window"):
            Keep.heads(full, sink=sink, recent=recent)


def test_compose_is_for_one_model(llama: Model) -> None:
    other = Plan("none", models.shared("qwen3").fingerprint)
    with pytest.raises(InputError, match="another model"):
        compose(tiny("duo-0", llama.name), other)


def test_a_fresh_process_knows_every_kind_that_a_file_may_hold() -> None:
    """Methods define none, so that a plan is read without the file of its method."""
    script = """
import importlib, pkgutil
import kvtool.encoding, kvtool.plan
from kvtool.records import Record
known = set(Record.kinds)
for _, name, _ in pkgutil.walk_packages(kvtool.encoding.__path__, "kvtool.encoding."):
    importlib.import_module(name)
print(sorted(set(Record.kinds) - known - {"Codes", "Stream"}))  # which only a snapshot holds
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
