"""Running kvtool: in this process, which is quick, and in a real shell."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kvtool import cli

ROOT = Path(__file__).parents[2]
# Nothing is looked for on the network, and the tests' own Python runs.
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
}


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it said."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode().strip()

    @property
    def document(self) -> Any:
        """Stdout as exactly one JSON document; NaN is none."""
        return json.loads(self.out, parse_constant=pytest.fail)

    def fine(self) -> Ran:
        assert self.code == 0, self.err
        return self

    def refused(self, *words: str, code: int = 2) -> None:
        """Nothing on stdout, and one line on stderr with these words in it."""
        assert (self.code, self.out) == (code, b""), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("kvtool: "), self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err


def kv(*arguments: object, stdin: bytes = b"") -> Ran:
    """`kvtool ARGUMENTS` in this process."""
    out, err, source = (io.TextIOWrapper(io.BytesIO(data), "utf-8", write_through=True) for data in (b"", b"", stdin))
    argv = ["kvtool", *map(str, arguments)]
    with mock.patch.multiple(sys, argv=argv, stdout=out, stderr=err, stdin=source), pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    return Ran(code if isinstance(code, int) else 0, out.buffer.getvalue(), err.buffer.getvalue().decode())  # type: ignore[attr-defined]


def shell(command: str, folder: Path) -> Ran:
    """A line of bash in `folder`; fails when any part of a pipe does."""
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
        timeout=240,
    )
    return Ran(run.returncode, run.stdout, run.stderr.decode())


def files(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
