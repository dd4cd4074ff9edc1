"""Compile what a Triton twin would launch, for targets that this machine need not have, and read back what it costs.

`python -m tests.kernels.compiled < cases.json` with TRITON_INTERPRET=0: each case is `[operation, case, dtype]`, `case`
an expression over the operation's `spec` module; the twin's own host code chooses blocks and warps, its launches are
recorded instead of run. `operation:function` names one of several functions. Prints one JSON list of reports.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPTIONS = ("num_warps", "num_stages")
CUOBJDUMP = next(Path(triton.__file__).parent.rglob("cuobjdump"))
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip

Launch = tuple[JITFunction, dict[str, Any], dict[str, int]]


def launches(operation: str, case: str, dtype: str) -> list[Launch]:
    """(kernel, arguments by name, options) of each launch that the twin makes for one case."""
    operation, _, function = operation.partition(":")
    spec = importlib.import_module(f"kvtool_kernels.{operation}.spec")
    module = importlib.import_module(f"kvtool_kernels.{operation}.triton")
    made: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        made.append((self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        given = eval(case, {**vars(spec), "torch": torch, "dtype": getattr(torch, dtype)})
        getattr(module, function or operation)(**given)
    finally:
        JITFunction.run = run
    return made


def source(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """Typed and specialised as a launch would: ones and None are constants, pointers and multiples of 16 say so."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def usage(built: Any) -> dict[str, int]:
    """Registers of a thread, spilled bytes or registers, shared memory in bytes."""
    if "amdgcn" in built.asm:
        count = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", built.asm["amdgcn"])}
        # scalar registers spill into lanes of vector registers, which vgpr_count already holds
        return {
            "registers": count["vgpr_count"],
            "spills": count["vgpr_spill_count"],
            "shared": built.metadata.shared,
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "LOCAL", "STACK", "SHARED")}
    return {
        "registers": found["REG"],
        "spills": found["LOCAL"] + found["STACK"],
        "shared": max(found["SHARED"], built.metadata.shared),
    }


def main() -> None:
    reports = []
    for operation, case, dtype in json.load(sys.stdin):
        for kernel, arguments, options in launches(operation, case, dtype):
            for name, target in TARGETS.items():
                own = {**options, "num_warps": options.get("num_warps", 4) * 32 // target.warp_size}  # as tiles.warps
                built = triton.compile(source(kernel, arguments), target=target, options=own)
                report = {"operation": operation, "case": case, "dtype": dtype, "target": name}
                reports.append({**report, "kernel": kernel.__name__, **usage(built)})
    sys.stdout.write(json.dumps(reports))


if __name__ == "__main__":
    main()
