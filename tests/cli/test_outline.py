"""`inspect` says what a slot holds, record by record, without defaults."""

from __future__ import annotations

import torch

from kvtool import records
from kvtool.commands._outline import outline
from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Hadamard
from kvtool.slots import Store


def told(store: Store) -> dict[str, str]:
    tensors: dict[str, torch.Tensor] = {}
    document = records.dump(store, "store", tensors)
    return dict(outline("store", document, {name: list(tensor.shape) for name, tensor in tensors.items()}))


def test_records_have_lines_of_their_own_and_defaults_none() -> None:
    key = Encoding(Affine(4, 32, "token"), (Hadamard(),), rotated=False)
    value = Encoding(Affine(2, 32, "channel", clip=0.8))
    assert told(Store((key,), (value,), torch.zeros(3, 2, dtype=torch.int32), recent=64)) == {
        "store": "Store(index [3,2], recent=64)",
        "store.keys.0": "Encoding(rotated=False)",
        "store.keys.0.codec": "Affine(bits=4, group=32, axis=token)",
        "store.keys.0.transforms.0": "Hadamard()",
        "store.values.0.codec": "Affine(bits=2, group=32, axis=channel, clip=0.8)",
    }


def test_alike_entries_share_a_line() -> None:
    side = (Encoding(), Encoding(), Encoding(Affine(8, 8, "channel")))
    lines = told(Store(side, side[::-1], torch.zeros(3, 2, dtype=torch.int32)))
    assert lines["store.keys.0 … 1"] == "Encoding()"
    assert "store.keys.1" not in lines
    assert lines["store.values.1 … 2"] == "Encoding()"


def test_a_file_from_before_a_field_was_there_has_its_default() -> None:
    document = {"kind": "Affine", "bits": 4, "group": 32, "axis": "token"}  # no clip
    assert dict(outline("keys", document, {})) == {"keys": "Affine(bits=4, group=32, axis=token)"}
