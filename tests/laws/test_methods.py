"""The table of methods is complete, and its rows are what they say."""

from __future__ import annotations

import pytest

from kvtool import registry
from kvtool.model import Model
from tests.laws.methods import LOSSLESS, ROWS, TINY, lossless, places, tiny
from tests.models import ARCHITECTURES


def test_every_method_has_a_row() -> None:
    assert sorted(ROWS) == registry.names("methods")


@places(TINY)
def test_tiny_settings_are_lossy(case: str, model: Model) -> None:
    assert any(tiny(case, model.name).slots.values())


@pytest.mark.parametrize("case", LOSSLESS)
def test_plans_carry_the_fingerprint_of_their_model(case: str, llama: Model) -> None:
    lossless(case, llama.name).check(llama.fingerprint)


@pytest.mark.parametrize("turn", range(3))
def test_every_law_meets_every_architecture(turn: int) -> None:
    for cases in (LOSSLESS, TINY):
        assert {name for _, name in places(cases, turn).args[1]} == set(ARCHITECTURES)


def test_every_case_meets_every_architecture_in_some_law() -> None:
    for case in TINY:
        met = {name for turn in range(3) for found, name in places(TINY, turn).args[1] if found == case}
        assert met == set(ARCHITECTURES)
