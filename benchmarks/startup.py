"""How long `kvtool --help` takes, against a bare Python."""

from __future__ import annotations

import subprocess
import sys

from _harness import medians, table


def main() -> None:
    sides = {
        "python -c pass": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        "kvtool --help": lambda: subprocess.run(
            [sys.executable, "-m", "kvtool", "--help"], check=True, capture_output=True
        ),
    }
    seconds = medians(sides, 9)
    table("Start-up", ("command", "median, s"), [(name, f"{value:.3f}") for name, value in seconds.items()])


if __name__ == "__main__":
    main()
