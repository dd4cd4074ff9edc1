"""What PyTorch makes of a tensor whose dtype nobody names is the caller's affair: no operation depends on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels.quantize import spec as quantizing
from tests.running import by_default
from tests.tolerance import same

OPERATIONS = {
    "attend": "attend", "attend_scored": "attend", "attend_evict": "attend_evict", "attend_packed": "attend_packed",
    "attend_latent": "latent", "attend_selected": "select", "attention_statistics": "attention_statistics",
    "streaming_prefill": "prefill",
}  # fmt: skip


def tensors(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from tensors(part)
    elif hasattr(x, "__dict__"):
        yield from tensors(list(vars(x).values()))


def agree(make: Callable[[], Callable[[], Any]]) -> None:
    """The operation that is made does the same with either default."""
    found = [list(tensors(by_default(dtype, make()))) for dtype in (torch.float32, torch.bfloat16)]
    assert found[0]
    for mine, other in zip(*found, strict=True):
        same(mine, other)


@pytest.mark.parametrize("name", OPERATIONS)
def test_of_every_case(name: str) -> None:
    spec = importlib.import_module(f"kvtool_kernels.{OPERATIONS[name]}.spec")
    operation = getattr(ops, name)
    for case in spec.CASES:
        given = spec.inputs(case)
        if name == "attend_scored":
            given = {key: given[key] for key in ("q", "k", "v", "scale", "softcap")}

        def make(given: dict[str, Any] = given) -> Callable[[], Any]:
            copies = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
            return lambda: operation(**copies)

        agree(make)


def test_codes_and_back() -> None:
    for case in quantizing.CASES:
        x = quantizing.inputs(case)
        agree(lambda x=x, case=case: lambda: quantizing.coded(x, case.side))
        packed = quantizing.coded(x, case.side)
        agree(lambda packed=packed: lambda: ops.dequantize(packed))
