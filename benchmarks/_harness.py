"""What every benchmark shares: the machine line, sides that take turns, medians, and a markdown table."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def machine() -> str:
    """Processor, cores, torch and the day: the conditions beside every table."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    conditions = f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return f"{processor}, {conditions}, {datetime.date.today()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def medians(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds per side; the sides take turns, after one unmeasured round."""
    for work in sides.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Markdown on stdout."""
    print(f"\n### {title}\n\n{machine()}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print(
            "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |",
            flush=True,
        )
