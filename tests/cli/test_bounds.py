"""`replay --fail-if`: exit code 1 when a bound is broken, with everything written all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.terminal import files, kv
from tests.cli.tiny import REPLAY, TEXT


@pytest.mark.parametrize("bound", ["kl<1e9", "kl <= 1e9", "agreement>=0", "perplexity-ratio>0"])
def test_broken(bound: str, model: Path, plan: Path, here: Path) -> None:
    ran = kv("replay", model, "--plan", plan, *TEXT, "--fail-if", bound, "-o", "v.json")
    assert (ran.code, ran.text) == (1, "v.json")
    assert ran.err.splitlines()[-1].startswith(f"kvtool: broken bound: {bound} (it is ")
    written = json.loads(Path("v.json").read_text())
    assert written["metrics"]["kl"] > 0
    assert files(here) == {"v.json"}


def test_broken_on_stdout(model: Path, plan: Path, here: Path) -> None:
    ran = kv("replay", model, "--plan", plan, *TEXT, "--fail-if", "kl<1e9", "--json")
    assert ran.code == 1
    assert ran.document["metrics"]["kl"] > 0


def test_every_broken_bound_is_named(model: Path, plan: Path, here: Path) -> None:
    bounds = ("--fail-if", "kl<1e9", "--fail-if", "kl>1e9", "--fail-if", "agreement>=0")
    last = kv("replay", model, "--plan", plan, *TEXT, *bounds).err.splitlines()[-1]
    assert ("kl<1e9" in last, "agreement>=0" in last, "kl>1e9" in last) == (True, True, False)


def test_kept(model: Path, lossless: Path, here: Path) -> None:
    bounds = ("kl>1e-9", "agreement<1", "perplexity_ratio>1.0000001", "same_tokens<4", "bytes_ratio>1", "recall<0")
    every = [part for bound in bounds for part in ("--fail-if", bound)]
    kv("replay", model, "--plan", lossless, *REPLAY, *every).fine()
