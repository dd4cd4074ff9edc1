"""Kernels on one decode step of SmolLM2 (9 query heads on 3 KV heads of 64 channels): parity first, then the table.

Sides take turns, each after a copy of a large buffer, which displaces the entries from the processor's cache as the
other layers of a model would; that copy is the ceiling too. GB/s counts what an operation must read and write once.
The yardstick is PyTorch's attention over the dense cache, the faster of its two ways with grouped heads.

python benchmarks/kernels.py [--device cuda] [--dtype float16] [--entries 4096,65536] [--repeats 30]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _harness import medians, table
from torch.nn.functional import scaled_dot_product_attention

from kvtool_kernels import ops
from kvtool_kernels.attend.reference import attend as attend_reference
from kvtool_kernels.attend_packed import spec as attend_packed_spec
from kvtool_kernels.attend_packed.reference import attend_packed as attend_packed_reference
from kvtool_kernels.hadamard.reference import hadamard as hadamard_reference
from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.quantize import spec as quantize_spec
from kvtool_kernels.quantize.reference import dequantize as dequantize_reference

HEADS, KV_HEADS, WIDTH, GROUP, BITS = 9, 3, 64, 32, (2, 3, 4, 8)
LAYOUTS: tuple[Layout, ...] = ("token", "channel")
LARGE = 16 << 20  # numbers of the buffer that is copied: more than a processor's cache holds
Work = tuple[Callable[[], object], int]  # what is timed, and the bytes it moves


def parity(device: str) -> int:
    """The fast twins against their definitions, over every case of their specs. Returns how many."""
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.tolerance import close  # the one tolerance table

    for case in attend_packed_spec.CASES:
        given = attend_packed_spec.inputs(case, device=device)
        (out, lse), (expected, total) = ops.attend_packed(**given), attend_packed_reference(**given)
        close(out, expected)
        close(lse.nan_to_num(neginf=0.0), total.nan_to_num(neginf=0.0))
    for shape in quantize_spec.CASES:
        x, side = quantize_spec.inputs(shape, device=device), shape.side
        packed = quantize_spec.coded(x, side)
        if side.code == "affine" and not side.outliers:
            made = ops.quantize(x, bits=side.bits, group=side.group, layout=side.layout)
            for actual, wanted in zip(made.tensors(), packed.tensors(), strict=True):
                torch.testing.assert_close(actual, wanted, atol=0, rtol=0)
        expected = dequantize_reference(packed)
        size = expected.abs().max().clamp_min(1.0) if expected.numel() else 1.0
        close(ops.dequantize(packed) / size, expected / size)
    x = torch.randn(500, WIDTH, device=device)
    close(ops.hadamard(x), hadamard_reference(x))
    q, k = torch.randn(2, HEADS, 1, WIDTH, device=device), torch.randn(2, KV_HEADS, 5000, WIDTH, device=device)
    close(ops.attend(q, k, k, scale=0.125)[0], attend_reference(q, k, k, scale=0.125)[0])
    return len(attend_packed_spec.CASES) + len(quantize_spec.CASES) + 2


def sides(entries: int, dtype: torch.dtype, device: str) -> dict[str, Work]:
    """Everything that is measured over one length of the cache."""
    q = torch.randn(1, HEADS, 1, WIDTH, device=device, dtype=dtype)
    k, v = (torch.randn(1, KV_HEADS, entries, WIDTH, device=device, dtype=dtype) for _ in range(2))
    each_k, each_v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scale, dense = WIDTH**-0.5, k.nbytes + v.nbytes
    name = str(dtype).removeprefix("torch.")
    found: dict[str, Work] = {
        f"SDPA, grouped|{name}": (lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), dense),
        f"SDPA, repeated|{name}": (lambda: scaled_dot_product_attention(q, each_k, each_v), dense),
        f"attend|{name}": (lambda: ops.attend(q, k, v, scale=scale), dense),
    }
    for bits in BITS:
        keys = ops.quantize(k, bits=bits, group=GROUP, layout="token")
        values = ops.quantize(v, bits=bits, group=GROUP, layout="channel")
        found[f"attend_packed|{bits} bits"] = (
            lambda a=keys, b=values: ops.attend_packed(q, a, b, scale=scale),
            keys.nbytes + values.nbytes,
        )
        for side in (keys, values):
            found[f"dequantize, per {side.layout}|{bits} bits"] = _decoding(side, dtype)
    for layout in LAYOUTS:
        found[f"quantize, per {layout}|4 bits"] = _coding(k, layout)
    found[f"hadamard|{name}"] = (lambda: ops.hadamard(k), 2 * k.nbytes)
    return found


def _coding(x: torch.Tensor, layout: Layout) -> Work:
    return lambda: ops.quantize(x, bits=4, group=GROUP, layout=layout), x.nbytes


def _decoding(side: Packed, dtype: torch.dtype) -> Work:
    elements = side.codes.shape[1] * side.tokens * side.width
    return lambda: ops.dequantize(side, dtype), side.nbytes + elements * dtype.itemsize


def timed(works: dict[str, Work], repeats: int, device: str) -> tuple[dict[str, float], float]:
    """Median seconds of each, and the bytes per second of the copy between them."""
    source, target = (torch.randn(LARGE, device=device) for _ in range(2))
    calls: dict[str, Callable[[], object]] = {}
    for name, (work, _) in works.items():
        calls[f"copy before {name}"] = settled(lambda: target.copy_(source), device)
        calls[name] = settled(work, device)
    seconds = medians(calls, repeats)
    copies = [value for name, value in seconds.items() if name not in works]
    return {name: seconds[name] for name in works}, 2 * source.nbytes / statistics.median(copies)


def settled(work: Callable[[], object], device: str) -> Callable[[], object]:
    """On a GPU: until it is done."""
    return work if device == "cpu" else lambda: (work(), torch.cuda.synchronize())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--entries", default="4096,65536")
    parser.add_argument("--repeats", type=int, default=30)
    chosen = parser.parse_args()
    dtype = getattr(torch, chosen.dtype)
    torch.manual_seed(0)
    print(f"parity: {parity(chosen.device)} cases agree", file=sys.stderr)
    rows = []
    for entries in map(int, chosen.entries.split(",")):
        works = sides(entries, dtype, chosen.device)
        seconds, ceiling = timed(works, chosen.repeats, chosen.device)
        yardstick = min(value for name, value in seconds.items() if name.startswith("SDPA"))
        for name, (_, moved) in works.items():
            operation, code = name.split("|")
            speed, ratio = moved / seconds[name], f"{yardstick / seconds[name]:.2f}×"
            attention = operation.startswith(("SDPA", "attend"))
            shape = f"K{KV_HEADS}-S{entries}-D{WIDTH}" if not attention else f"H{HEADS}-K{KV_HEADS}-S{entries}-D{WIDTH}"
            rows.append((
                operation, shape, code, f"{seconds[name] * 1e3:.3f}", f"{speed / 1e9:.1f}", f"{speed / ceiling:.2f}",
                ratio if attention else "",
            ))  # fmt: skip
        rows.append(("copy", f"{LARGE} fp32", "", "", f"{ceiling / 1e9:.1f}", "1.00", ""))
    columns = ("operation", "shape", "code", "ms", "GB/s", "of the copy", "speed against SDPA")
    table(f"Kernels on {chosen.device}", columns, rows)


if __name__ == "__main__":
    main()
