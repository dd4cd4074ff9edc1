"""Each Triton kernel compiled ahead of time for each target, without any GPU: no spills, and it fits.

One row of the table is one call of a twin; all kernels that it launches are compiled as they would be launched
(`compiled.py`). Register bounds are what the pinned Triton needs, rounded up: a kernel that grows past its bound is
to be looked at, not the bound to be raised unseen. Speed is not measured here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tests.kernels.twins import OPERATIONS, names

pytest.importorskip("triton", reason="Triton has wheels on Linux only")

HEADS = "heads=32, kv_heads=8"
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes that one block of threads may have

# (operation, or operation:function; its arguments over the spec; dtype; most registers of a thread on sm_80 and sm_90)
TABLE = (
    ("merge", "dict(zip('ab', inputs((1, 2, 500, 128), 2, dtype=dtype)))", "float16", 32),
    ("attend", "inputs(Case(heads=4, kv_heads=1, entries=4096, width=128), dtype=dtype)", "float16", 160),  # in splits
    ("attend", "inputs(Case(heads=1, kv_heads=1, entries=1000), dtype=dtype)", "float16", 160),  # sizes of 1: constants
    ("attend", f"inputs(Case({HEADS}, entries=4096, width=256), dtype=dtype)", "bfloat16", 192),
    ("attend", f"inputs(Case({HEADS}, entries=4096, width=128, tokens=512, causal=True), dtype=dtype)", "float16", 208),
    ("attend", f"inputs(Case({HEADS}, entries=512, tokens=64, batch=2, hide='padding', softcap=9.0), dtype=dtype)",
     "bfloat16", 192),
    ("attend", f"inputs(Case({HEADS}, entries=4096, width=128, tokens=64), dtype=dtype)", "float32", 128),
    ("attend_packed", f"inputs(kivi(2, {HEADS}, width=128), dtype=dtype)", "float16", 160),
    ("attend_packed", f"inputs(kivi(4, 128, {HEADS}, width=128, tokens=64), dtype=dtype)", "bfloat16", 255),
    ("attend_packed", f"inputs(Case(Side(7, 'channel', 32), Side(7, 'token', 32), {HEADS}, width=256), dtype=dtype)",
     "float16", 255),
    ("attend_packed", f"inputs(Case(Side(3, 'channel', 128, 'levels'), Side(3, 'token', 128, 'levels'), {HEADS}, "
     "width=128), dtype=dtype)", "float16", 255),
    ("attend_packed", f"inputs(kivi(4, {HEADS}, width=128), dtype=dtype)", "float32", 144),
    ("quantize", "{'x': inputs(Case(width=128), dtype=dtype), 'bits': 7, 'group': 32, 'layout': 'token'}",
     "float16", 72),
    ("quantize", "{'x': inputs(Case(width=128), dtype=dtype), 'bits': 4, 'group': 32, 'layout': 'channel'}",
     "float32", 72),
    ("quantize:quantize_levels", "{'x': inputs(Case(width=128), dtype=dtype), 'bits': 4, 'group': 32, "
     "'layout': 'token', 'levels': torch.linspace(-3, 3, 16), 'scale': torch.ones(2, 3, 2, 128), 'zero': None}",
     "float16", 64),
    ("quantize:dequantize", "{'packed': coded(inputs(Case(width=128)), Side(3)), 'dtype': dtype}", "float16", 96),
    ("attention_statistics", f"inputs(Case({HEADS}, tokens=512, width=128, cells=8), dtype=dtype)", "bfloat16", 255),
    ("attention_statistics",
     f"inputs(Case({HEADS}, tokens=512, width=64, window=100, softcap=9.0, sinks=True), dtype=dtype)", "float32", 192),
    ("latent:attend_latent", f"inputs(Case({HEADS}, entries=2048, width=128, rank=128, value_width=128), dtype=dtype)",
     "float16", 192),
    ("prefill:streaming_prefill", f"inputs(Case({HEADS}, width=128, tokens=512, start=512), dtype=dtype)",
     "float16", 208),
    ("select:attend_selected", f"inputs(Case({HEADS}, entries=2048, listed=512, width=128), dtype=dtype)",
     "float16", 96),
    ("hadamard", "{'x': inputs((512, 128), dtype=dtype)}", "bfloat16", 72),
)  # fmt: skip


@cache
def reports() -> list[dict[str, Any]]:
    """One process compiles them all: it must import Triton without the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        input=json.dumps([row[:3] for row in TABLE]),
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made: list[dict[str, Any]] = json.loads(done.stdout)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[2]}-{row[1]}")
def test_it_fits_without_spilling(row: tuple[str, str, str, int], target: str) -> None:
    operation, case, dtype, registers = row
    found = [
        report for report in reports()
        if (report["operation"], report["case"], report["dtype"], report["target"]) == (operation, case, dtype, target)
    ]  # fmt: skip
    assert found
    for report in found:
        assert report["spills"] == 0, report
        assert report["shared"] <= SHARED[target], report
        assert report["registers"] <= (512 if target == "gfx942" else registers), report


def test_every_operation_has_a_row() -> None:
    compiled = {row[0].partition(":")[0] for row in TABLE}
    assert compiled == {operation for operation in OPERATIONS if "triton" in names(operation)}
