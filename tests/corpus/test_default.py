"""The default text is prose, is always the same, and its halves share nothing."""

from __future__ import annotations

import builtins

import pytest

from kvtool.corpus import default
from kvtool.errors import InputError


def paragraphs(half):
    return [paragraph for document in default.documents(half) for paragraph in document.split("\n\n")]


def test_the_halves_share_no_paragraph_and_are_the_whole():
    calibration, held_out = paragraphs("calibration"), paragraphs("held-out")
    assert not set(calibration) & set(held_out)
    assert sorted(calibration + held_out) == sorted(paragraphs(None))


def test_the_halves_are_of_about_equal_size():
    sizes = [sum(map(len, paragraphs(half))) for half in default.HALVES]
    assert min(sizes) > 100_000
    assert max(sizes) < 1.05 * min(sizes)


def test_no_paragraph_stands_twice():
    assert len(set(paragraphs(None))) == len(paragraphs(None))


def test_it_is_prose():
    for paragraph in paragraphs(None):
        assert "\n" not in paragraph
        assert not any(noise in paragraph for noise in ("::=", ">>>", "====", "****"))
        assert len(paragraph.split()) >= 8


def test_an_unknown_half_is_refused():
    with pytest.raises(InputError, match="calibration or held-out"):
        default.documents("training")


def test_a_python_without_topics_says_what_to_do(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pydoc_data"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="Name a text file or folder"):
        default._topics()
