"""The file format, pinned by its bytes; whatever is not a whole kvtool file is refused with a remedy."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from kvtool import __version__, files
from kvtool.errors import InputError
from tests.tolerance import same

HEADER = {"kind": "trace", "schema": 1, "note": "naïve α", "list": [1, 2.5, None], "nested": {"b": 1, "a": 2}}
TENSORS = {
    "b": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "a/x": torch.tensor([1.5, float("-inf")], dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "bf16": torch.tensor([0.1], dtype=torch.bfloat16),
}
GOLDEN = "a529729dbdf56d946d98bcdd714c1043ef3140b69d85d530907fd13a0abfed82"


def write(path: Path, **options: bool) -> bytes:
    files.write(path, HEADER, TENSORS, **options)
    return path.read_bytes()


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "file")
    header, tensors = files.read(tmp_path / "file", kind="trace", schema=1)
    assert header == {**HEADER, "kvtool": __version__}
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        same(tensors[name], tensor)


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    payload = write(tmp_path / "file")
    same(load(payload)["b"], TENSORS["b"])
    (length,) = struct.unpack("<Q", payload[:8])
    metadata = json.loads(payload[8 : 8 + length])["__metadata__"]
    assert list(metadata) == ["kvtool"]
    assert json.loads(metadata["kvtool"])["kind"] == "trace"


def test_the_bytes_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change here is a change of the format: raise the schema of what is written and say so in the changelog."""
    monkeypatch.setattr(files, "__version__", "0")
    assert hashlib.sha256(write(tmp_path / "file")).hexdigest() == GOLDEN


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    first = write(tmp_path / "one")
    files.write(
        tmp_path / "two",
        dict(reversed(HEADER.items())),
        {name: TENSORS[name].clone() for name in reversed(TENSORS)},
    )
    assert (tmp_path / "two").read_bytes() == first
    strided = {**TENSORS, "b": TENSORS["b"].T.contiguous().T}
    files.write(tmp_path / "three", HEADER, strided)
    assert (tmp_path / "three").read_bytes() == first


def test_stdin_and_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=pipe))
    assert files.write("-", HEADER, TENSORS) == "-"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pipe.getvalue())))
    header, tensors = files.read("-", kind="trace")
    assert header["note"] == HEADER["note"]
    same(tensors["a/x"], TENSORS["a/x"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    with pytest.raises(InputError, match="stdin"):
        files.read("-")


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    payload = write(tmp_path / "file")
    with pytest.raises(InputError, match="--force"):
        files.write(tmp_path / "file", {"kind": "plan", "schema": 1}, {})
    assert (tmp_path / "file").read_bytes() == payload
    files.write(tmp_path / "file", {"kind": "plan", "schema": 1}, {}, force=True)
    assert files.read(tmp_path / "file")[0]["kind"] == "plan"


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mkdir"):
        files.write(tmp_path / "no" / "file", HEADER, TENSORS)
    with pytest.raises(InputError, match="folder"):
        files.write(tmp_path, HEADER, TENSORS, force=True)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, payload: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    payload = write(tmp_path / "file")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        files.write(tmp_path / "file", HEADER, {}, force=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == payload


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated(keep: int, tmp_path: Path) -> None:
    payload = write(tmp_path / "file")
    (tmp_path / "file").write_bytes(payload[:keep])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        files.read(tmp_path / "file")


def test_damaged_header(tmp_path: Path) -> None:
    payload = write(tmp_path / "file")
    (tmp_path / "file").write_bytes(payload[:8] + b"x" * 100 + payload[108:])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        files.read(tmp_path / "file")


def test_not_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        files.read(tmp_path / "none")
    with pytest.raises(InputError, match="cannot read"):
        files.read(tmp_path)
    for metadata in (None, {"kvtool": "{"}, {"kvtool": "[]"}, {"kvtool": '{"kind": "trace"}'}, {"other": "1"}):
        (tmp_path / "file").write_bytes(save({"a": torch.zeros(1)}, metadata=metadata))
        with pytest.raises(InputError, match="not written by kvtool"):
            files.read(tmp_path / "file")


def test_wrong_kind_and_schema(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with pytest.raises(InputError, match=r"got a trace, expected a plan"):
        files.read(tmp_path / "file", kind="plan")
    with pytest.raises(InputError, match=r"got 1, expected 2"):
        files.read(tmp_path / "file", kind="trace", schema=2)


def test_digest() -> None:
    assert files.digest("a", b"b") == files.digest(b"a", "b") != files.digest("ab")
    assert files.digest(torch.arange(4)) != files.digest(torch.arange(4).int())
    assert files.digest(torch.arange(6).reshape(2, 3).T) == files.digest(torch.arange(6).reshape(2, 3).T.contiguous())
    assert files.digest("kvtool") == "7ef00defe1e23904"
