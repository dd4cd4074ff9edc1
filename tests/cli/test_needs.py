"""What a calibration needs is there when its mode asks for it, whether it is given a model or a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.terminal import kv
from tests.cli.tiny import RAZOR, save

SHORT = ("--set", "samples=2", "--set", "tokens=240")


@pytest.mark.parametrize(
    ("method", "settings"),
    [("prefixkv", SHORT), ("mpcache", SHORT), ("turboquant", ("--set", "keys=2.5", "--set", "skip=0", *SHORT))],
)  # fmt: skip
def test_a_trace_brings_the_model_that_a_mode_runs(
    method: str, settings: tuple[str, ...], model: Path, induction: Path, here: Path
) -> None:
    """The trace has nothing that these methods read, but it names the model; the plan is that of the model alone."""
    numbers = []
    for source in (model, induction):
        kv("calibrate", source, "--method", method, *settings, "-o", f"{source.name}.plan").fine()
        numbers.append(kv("inspect", f"{source.name}.plan", "--json").fine().document["numbers"])
    assert numbers[0]
    assert numbers[0] == numbers[1]


def test_nothing_is_loaded_that_no_mode_runs(here: Path) -> None:
    """A model that is gone is not missed."""
    gone = save(here / "gone")
    kv("profile", gone, *RAZOR, "-o", "a.trace").fine()
    for file in gone.iterdir():
        file.unlink()
    kv("calibrate", "a.trace", "--method", "prefixkv", "--set", "mode=prompt", "-o", "a.plan").fine()
    kv("calibrate", "a.trace", "--method", "prefixkv", "-o", "b.plan").refused()
    assert not Path("b.plan").exists()


def test_a_trace_of_other_weights_is_told(here: Path) -> None:
    folder = save(here / "changing")
    kv("profile", folder, *RAZOR, "-o", "a.trace").fine()
    save(folder, seed=1)
    kv("calibrate", "a.trace", "--method", "prefixkv", *SHORT, "-o", "b.plan").refused("the trace is of another model")


def test_how_far_queries_lie_from_keys_is_shown(model: Path, here: Path) -> None:
    kv("calibrate", model, "--method", "retrieval-attention", "-o", "a.plan").fine()
    ran = kv("inspect", "a.plan", "--json").fine()
    assert ran.document["numbers"]["evidence.outside"]["most"] > 0
    assert "evidence.outside" in ran.err
