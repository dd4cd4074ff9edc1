"""Records: every value there and back through a file, and what neither side of it accepts."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool import files
from kvtool.encoding.codecs import Affine, Levels, Raw, Ternary
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.encoding.transforms import Gather, Hadamard, Join, Linear, Scale
from kvtool.records import Record, Tensors, dump, load, tensors_of
from tests.tolerance import same

TABLE = Levels(torch.linspace(-1, 1, 4), 1, "channel", "fixed", torch.ones(1, 8), None)
BASIS = Linear(torch.randn(2, 8, 5), torch.randn(2, 5, 8), torch.randn(2, 8))
VALUES: tuple[Any, ...] = (
    None, True, 0, -3, 1e-40, 0.1, "a b", (), (1, (2.5, None), "x"),
    Raw(), Affine(3, 8, "token", 0.8), TABLE, Ternary(32, "channel"), Hadamard(), Join(2), BASIS,
    Scale(torch.tensor([[0.5, float("inf")]])), Gather(torch.tensor([[3, 1]]), 8),
    Encoding(TABLE, (Join(2), BASIS, Hadamard()), Outliers(1, "token", 8), ErrorBasis(2, 8), False),
    {}, {"scale": torch.ones(2), "tensor": 3, "kind": ("x", None)}, (Encoding(), Encoding(transforms=(BASIS, BASIS))),
)  # fmt: skip


def equal(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        same(first, second)
    elif isinstance(first, Record):
        for field in fields(first):  # type: ignore[arg-type]
            equal(getattr(first, field.name), getattr(second, field.name))
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        equal(tuple(first[key] for key in first), tuple(second[key] for key in first))
    elif isinstance(first, tuple):
        for one, other in zip(first, second, strict=True):
            equal(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_there_and_back(value: Any, tmp_path: Path) -> None:
    tensors: Tensors = {}
    document = dump(value, "slot", tensors)
    equal(load(json.loads(json.dumps(document)), tensors), value)
    path = files.write(tmp_path / "file", {"kind": "plan", "schema": 1, "slot": document}, tensors)
    header, read = files.read(path)
    equal(load(header["slot"], read), value)


def test_the_document() -> None:
    tensors: Tensors = {}
    document = dump(Encoding(Affine(2, 8, "token"), (Scale(torch.ones(1, 4)), Hadamard())), "store.keys.0", tensors)
    assert document == {
        "kind": "Encoding",
        "codec": {"kind": "Affine", "bits": 2, "group": 8, "axis": "token", "clip": 1.0},
        "transforms": [
            {"kind": "Scale", "scale": {"tensor": "store.keys.0.transforms.0.scale"}},
            {"kind": "Hadamard"},
        ],
        "outliers": None,
        "error": None,
        "rotated": True,
    }
    assert list(tensors) == ["store.keys.0.transforms.0.scale"]


def test_tensors_of_equal_records_have_names_of_their_own() -> None:
    tensors: Tensors = {}
    dump((BASIS, BASIS), "x", tensors)
    assert sorted(tensors) == [f"x.{index}.{field}" for index in (0, 1) for field in ("down", "mean", "up")]
    assert len(tensors_of(VALUES[-1])) == 6
    assert tensors_of(Encoding()) == []


@pytest.mark.parametrize("value", [[1], {1: 2}, {1}, torch.float32, 1j, b"x", (1, [2]), Scale([1.0])])  # type: ignore[arg-type]
def test_what_no_record_holds(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot hold"):
        dump(value, "slot", {})


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "Zip"},
        {"bits": 2},
        {"tensor": "absent"},
        {"kind": "Encoding", "codec": {"kind": "Affine2", "bits": 2}},
        {"kind": "Affine", "bits": 2, "group": 8},
        {"kind": "Affine", "bits": 2, "group": 8, "axis": "token", "colour": 1},
        {"kind": "Affine", "bits": "2", "group": 8, "axis": "token"},
        {"kind": "Codec"},
        {"kind": ["Affine"]},
    ],
    ids=str,
)
def test_damaged_documents(document: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        load(document, {})


def test_a_kind_is_one_class() -> None:
    """Two classes of one name would read each other's files."""
    with pytest.raises(TypeError, match="Affine"):

        @dataclass(frozen=True)
        class Affine(Record):
            bits: int
