"""The table of methods is complete, and its rows are what they say."""

from __future__ import annotations

import pytest

from kvtool import registry
from kvtool.model import Model
from tests.laws.methods import LOSSLESS, ROWS, TINY, lossless, tiny


def test_every_method_has_a_row() -> None:
    assert sorted(ROWS) == registry.names("methods")


@pytest.mark.parametrize("case", TINY)
def test_tiny_settings_are_lossy(case: str, model: Model) -> None:
    assert any(tiny(case, model.name).slots.values())


@pytest.mark.parametrize("case", LOSSLESS)
def test_plans_carry_the_fingerprint_of_their_model(case: str, llama: Model) -> None:
    lossless(case, llama.name).check(llama.fingerprint)
