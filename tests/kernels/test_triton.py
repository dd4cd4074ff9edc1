"""Triton twins without a GPU: run by the interpreter against the reference, compiled ahead of time for real targets.

Each check runs in a process of its own, because the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has wheels on Linux only")

INTERPRETED = """
import torch
from kvtool_kernels.merge import reference, triton

torch.manual_seed(0)
for shape in ((1, 1, 1), (2, 3, 5), (1, 9, 63), (0, 2, 3)):
    for width in (1, 48, 64, 100):
        a, b = ((torch.randn(*shape, width), torch.randn(*shape) * 30) for _ in range(2))
        if a[1].numel() > 2:
            a[1].view(-1)[0] = b[1].view(-1)[0] = float("-inf")  # both sides empty
            a[1].view(-1)[1] = float("-inf")
            a[0].view(-1, width)[:2] = b[0].view(-1, width)[0] = 0.0
        ours, theirs = triton.merge(a, b), reference.merge(a, b)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
"""

COMPILED = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvtool_kernels.merge.triton import merge_kernel

pointers = dict(out_a="*fp16", lse_a="*fp32", out_b="*fp16", lse_b="*fp32", out="*fp16", lse="*fp32")
signature = {**pointers, "width": "i32", "BLOCK": "constexpr"}
source = ASTSource(fn=merge_kernel, signature=signature, constexprs={"BLOCK": 128})
reports = {}
for name, target in {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)
}.items():
    built = triton.compile(source, target=target)
    if "cubin" not in built.asm:
        reports[name] = {"spills": int(re.search(r"vgpr_spill_count:\\s*(\\d+)", built.asm["amdgcn"]).group(1))}
        continue
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    reports[name] = {key: int(re.search(label + r":(\\d+)", usage).group(1)) for key, label in
                     (("registers", "REG"), ("spills", "LOCAL"), ("stack", "STACK"), ("shared", "SHARED"))}
print(json.dumps(reports))
"""


def run(code: str, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_merge_agrees_with_its_reference() -> None:
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_merge_compiles_without_spills() -> None:
    reports = json.loads(run(COMPILED, TRITON_INTERPRET="0"))
    assert set(reports) == {"sm_80", "sm_90", "gfx942"}
    for target, report in reports.items():
        assert report["spills"] == 0, target
    for target in ("sm_80", "sm_90"):
        assert reports[target]["stack"] == 0
        assert reports[target]["registers"] <= 64
        assert reports[target]["shared"] <= 1024
