"""Hardware as four numbers: operations a second, bytes of memory, and bytes a second of memory and of the host link.

`devices/NAME.yaml` has one each, peaks as the vendor states them; a user's file, YAML or JSON, has the same fields:

    tflops: {bfloat16: 989, float32: 67}    10^12 operations a second, by dtype
    memory: 141                             GB
    bandwidth: 4800                         GB/s
    link: 64                                GB/s, one way

No device reaches its peaks; what a benchmark reached on it can stand in a file as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvtool.errors import InputError, unknown

SHELF = Path(__file__).with_name("devices")
FIELDS = ("memory", "bandwidth", "link")


@dataclass(frozen=True)
class Hardware:
    """`flops` by dtype, operations a second; `memory` in bytes; `bandwidth` and `link` in bytes a second."""

    name: str
    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    link: float

    def speed(self, dtype: str) -> float:
        """Operations a second in `dtype`; raises InputError if the device has no number for it."""
        if dtype not in self.flops:
            raise InputError(f"{self.name} has no speed in {dtype}", expected="--dtype " + " or ".join(self.flops))
        return self.flops[dtype]


def names() -> list[str]:
    """Devices that kvtool knows."""
    return sorted(path.stem for path in SHELF.glob("*.yaml"))


def find(name: str) -> Hardware:
    """A known device, or a file's. Raises InputError for anything else."""
    known = SHELF / f"{name.lower()}.yaml"
    path = known if name.lower() in names() else Path(name)
    if not path.is_file():
        raise unknown("hardware", name, [*names(), "FILE.yaml"])
    try:
        document = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{name} is no YAML or JSON file", got=str(error).splitlines()[0]) from error
    return _built(path.stem, document, name)


def _built(stem: str, document: Any, name: str) -> Hardware:
    wanted = "tflops (by dtype), " + ", ".join(FIELDS)
    if not isinstance(document, dict) or set(document) != {"tflops", *FIELDS}:
        got = sorted(map(str, document)) if isinstance(document, dict) else type(document).__name__
        raise InputError(f"{name} does not describe hardware", got=got, expected=wanted)
    if not isinstance(document["tflops"], dict) or not document["tflops"]:
        raise InputError(f"tflops of {name}", got=document["tflops"], expected="one number or more by dtype")
    flops = {
        str(dtype): 1e12 * _positive(value, f"tflops.{dtype}", name) for dtype, value in document["tflops"].items()
    }
    memory, bandwidth, link = (1e9 * _positive(document[field], field, name) for field in FIELDS)
    return Hardware(stem, flops, memory, bandwidth, link)


def _positive(value: Any, field: str, name: str) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{field} of {name}", got=value, expected="a number above 0")
    return number
