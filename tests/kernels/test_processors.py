"""Compiled loops for a processor with narrower registers than this one may have keep to the same definitions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the other processor is of another family")
def test_eight_lanes_a_register_do() -> None:
    files = [str(HERE / name) for name in ("test_attend.py", "test_attend_evict.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ | {"NUMBA_CPU_NAME": "haswell"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:]
