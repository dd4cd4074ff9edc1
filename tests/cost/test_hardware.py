"""Devices that are known, and files that describe others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kvtool.cost import hardware
from kvtool.errors import InputError

MINE = {"tflops": {"bfloat16": 100, "float32": 5e1}, "memory": 16, "bandwidth": 500.5, "link": 12}


@pytest.mark.parametrize("name", hardware.names())
def test_each_device_is_whole_and_has_its_source(name: str) -> None:
    found = hardware.find(name)
    assert {"bfloat16", "float16", "float32"} <= set(found.flops)
    assert found.speed("float32") < found.speed("bfloat16")
    assert 10e9 < found.link < found.bandwidth < found.speed("float32")
    assert (hardware.SHELF / f"{name}.yaml").read_text().startswith("# ")
    assert hardware.find(name.upper()) == found


def test_what_is_known() -> None:
    assert hardware.names() == ["a100", "h100", "h200", "l40s", "mi300x", "rtx-4090"]
    found = hardware.find("h200")
    assert (found.memory, found.bandwidth, found.flops["bfloat16"]) == (141e9, 4.8e12, 989e12)


@pytest.mark.parametrize(("suffix", "write"), [("yaml", yaml.safe_dump), ("json", json.dumps)])
def test_a_file(tmp_path: Path, suffix: str, write: object) -> None:
    path = tmp_path / f"my gpu.{suffix}"
    path.write_text(write(MINE))  # type: ignore[operator]
    found = hardware.find(str(path))
    assert (found.name, found.memory, found.bandwidth, found.link) == ("my gpu", 16e9, 500.5e9, 12e9)
    assert found.flops == {"bfloat16": 1e14, "float32": 5e13}
    with pytest.raises(InputError, match="float16"):
        found.speed("float16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": 0}, "memory of"),
        ({"link": "fast"}, "link of"),
        ({"bandwidth": None}, "bandwidth of"),
        ({"memory": True}, "memory of"),
        ({"tflops": 100}, "tflops of"),
        ({"tflops": {}}, "tflops of"),
        ({"tflops": {"bfloat16": -1}}, "tflops.bfloat16 of"),
        ({"name": "x"}, "does not describe hardware"),
    ],
)
def test_bad_fields(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(MINE | changes))
    with pytest.raises(InputError, match=words):
        hardware.find(str(path))


@pytest.mark.parametrize("text", ["", "- 1", "tflops: {", "\x00"])
def test_no_description_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        hardware.find(str(path))


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match="id you mean 'h200'"):
        hardware.find("h20")
