"""Names are found however they are spelled; unknown ones get a suggestion; listing stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvtool.corpus import registry
from kvtool.corpus.twohop import twohop
from kvtool.errors import InputError


def test_names():
    assert registry.names() == ["graph", "needle", "order", "passkey", "repeat", "text", "two-hop"]


@pytest.mark.parametrize("name", ["two-hop", "two_hop", "twohop"])
def test_dashes_and_underscores_are_the_same(name):
    assert registry.builder(name) is twohop


def test_every_name_has_its_builder():
    assert all(callable(registry.builder(name)) for name in registry.names())


@pytest.mark.parametrize("name", ["passkeys", "base", "__init__"])
def test_unknown_kinds_are_refused(name):
    with pytest.raises(InputError, match="unknown kind of corpus"):
        registry.builder(name)


def test_unknown_options_are_refused():
    with pytest.raises(InputError, match=r"unknown option of the repeat corpus.*Did you mean 'period'"):
        registry.build("repeat", 100, periods=3)


def test_options_reach_the_builder():
    assert registry.build("repeat", 100, period=3, samples=2).provenance["options"]["period"] == 3


def test_listing_imports_no_torch():
    code = "import sys; from kvtool.corpus import registry; registry.names(); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )
