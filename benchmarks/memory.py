"""Does the memory of the process follow the ledger? About 2 GB of synthetic entries as they come, in 4 bits and in 2.

python benchmarks/memory.py [--gigabytes 2]

Every row is a process of its own: it fills dense segments, layer by layer, then moves their entries chunk by chunk
into coded ones, and reads how much resident memory it has gained. "Resident" is what the kernel says; "trimmed" is
that once the C library has handed back the memory that it keeps for later use. Exits with 1 where resident memory has
not fallen by what the ledger says, or trimmed memory is not what the ledger says, to a tenth. It does not know of
memory beyond the cache, such as a model's own. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from _harness import table

from kvtool.cache.lane import Step
from kvtool.cache.segments import Dense, Segment
from kvtool.cache.store.coded import Coded
from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding

LAYERS, HEADS, WIDTH, GROUP, CHUNK = 16, 8, 128, 32, 1024
BITS = (None, 4, 2)
APART = 0.1
STEP = Step(0, WIDTH**-0.5)


def resident() -> int:
    """Bytes of the process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def drawn(entries: int) -> torch.Tensor:
    return torch.randn(1, HEADS, entries, WIDTH)


def coded(bits: int) -> Coded:
    return Coded(Encoding(Affine(bits, GROUP, "token")), Encoding(Affine(bits, GROUP, "channel")))


def moved(held: Dense, bits: int) -> Coded:
    """The entries in coded form; what has moved is dense no more."""
    made = coded(bits)
    while held.length:
        made.append(*held.pop(min(CHUNK, held.length)))
    return made


def state(bits: int | None, entries: int) -> dict[str, int]:
    """Fill, move, measure; `entries` per layer."""
    warm = Dense()
    warm.append(drawn(CHUNK), drawn(CHUNK))
    warmed = warm if bits is None else moved(warm, bits)
    warmed.attend(drawn(1)[:, :, :1], STEP)  # code that is compiled or loaded once
    del warm, warmed
    gc.collect()
    before = resident()
    layers: list[Segment] = []
    for _ in range(LAYERS):
        held = Dense()
        held.append(drawn(entries), drawn(entries))
        layers.append(held)
    filled = resident()
    if bits is not None:
        for index, held in enumerate(layers):
            assert isinstance(held, Dense)
            layers[index] = moved(held, bits)
    gc.collect()
    ledger = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    after = resident()
    ctypes.CDLL(None).malloc_trim(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "ledger": ledger, "filled": filled - before, "resident": after - before, "trimmed": resident() - before,
        "peak": peak - before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--state", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    entries = round(chosen.gigabytes * 2**30 / (LAYERS * HEADS * WIDTH * 2 * 4) / CHUNK) * CHUNK
    if chosen.state is not None:
        print(json.dumps(state(json.loads(chosen.state), entries)))
        return
    rows, failed = [], []
    whole = None
    for bits in BITS:
        command = [sys.executable, __file__, "--gigabytes", str(chosen.gigabytes), "--state", json.dumps(bits)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        whole = whole or found["ledger"]
        name = "fp32, as it comes" if bits is None else f"{bits} bits, groups of {GROUP}"
        fall = (found["filled"] - found["resident"]) / (whole - found["ledger"]) if bits else 1.0
        ratio = found["trimmed"] / found["ledger"]
        rows.append((
            name, *(f"{found[key] / 1e6:.0f}" for key in ("filled", "ledger", "resident", "trimmed")),
            f"{fall:.3f}" if bits else "", f"{ratio:.3f}", f"{32 * found['ledger'] / whole:.2f}",
            f"{found['peak'] / 1e6:.0f}",
        ))  # fmt: skip
        if max(abs(fall - 1), abs(ratio - 1)) > APART:
            failed.append(name)
    columns = (
        "entries", "dense first, MB", "ledger, MB", "resident, MB", "trimmed, MB", "fall: resident ÷ ledger",
        "trimmed ÷ ledger", "bits an element", "peak, MB",
    )  # fmt: skip
    table(f"{LAYERS} layers of {HEADS} KV heads, {entries} entries of {WIDTH} channels", columns, rows)
    if failed:
        sys.exit(f"process and ledger differ by more than {APART:.0%}: " + ", ".join(failed))


if __name__ == "__main__":
    main()
