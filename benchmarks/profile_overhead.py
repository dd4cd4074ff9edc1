"""Default profile against the plain SDPA forward of the same tokens: time (one process, in turns) and peak memory
(a process each)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from _harness import medians, table

from kvtool.corpus.base import Corpus
from kvtool.corpus.text import text
from kvtool.model import Model, load
from kvtool.profile import default_statistics, profile
from kvtool.trace import Trace, statistic

LENGTHS, REPEATS = (4096, 8192), 3


def plain(model: Model, corpus: Corpus) -> None:
    """The model's own forward, without the vocabulary projection on either side."""
    with torch.no_grad():
        model.network.base_model(input_ids=corpus.samples[0].tokens[None], use_cache=False)


def observed(model: Model, corpus: Corpus) -> None:
    """Every default statistic over text."""
    names = [name for name in default_statistics() if statistic(name).corpus == "text"]
    trace = Trace(model.fingerprint, model.name, {name: statistic(name)(model, model.geometry) for name in names})
    profile(model, trace, {"text": corpus})


def peak(side: str, length: int) -> float:
    """Peak resident MB of a fresh process that runs one side once."""
    done = subprocess.run([sys.executable, __file__, side, str(length)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    model, rows = load("smollm2"), []
    for length in LENGTHS:
        corpus = text(model, ["default"], tokens=length, samples=1)
        seconds = medians(
            {"plain": lambda c=corpus: plain(model, c), "profile": lambda c=corpus: observed(model, c)}, REPEATS
        )
        memory = {side: peak(side, length) for side in seconds}
        ratios = [f"{side['profile'] / side['plain']:.2f}×" for side in (seconds, memory)]
        rows.append(
            (length, seconds["plain"], seconds["profile"], ratios[0], memory["plain"], memory["profile"], ratios[1])
        )
    columns = ("tokens", "plain, s", "profile, s", "time", "plain, MB", "profile, MB", "peak memory")
    table("Default profile of SmolLM2 in fp32 against its plain forward", columns, rows)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        subject = load("smollm2")
        {"plain": plain, "profile": observed}[sys.argv[1]](
            subject, text(subject, ["default"], tokens=int(sys.argv[2]), samples=1)
        )
        status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak as well
        print(int(re.search(r"VmHWM:\s*(\d+)", status).group(1)) / 1e3)
    else:
        main()
