"""The text that is always there: the prose of Python's own help topics (`pydoc_data.topics`).

About 60,000 tokens of English technical prose. Paragraphs are unwrapped; headings' underlines, grammar, code
and emphasis marks are dropped, and so is any paragraph that an earlier topic already had. Topics are dealt to
two halves of about equal size, "calibration" and "held-out": what is calibrated on one can be judged on the
other.

It depends on the Python that runs it; `SOURCE` names the version and goes into every provenance.
"""

from __future__ import annotations

import platform
import re
from functools import cache

from kvtool.errors import InputError

HALVES = ("calibration", "held-out")
SOURCE = f"default: help topics of Python {platform.python_version()}"


def documents(half: str | None = None) -> list[str]:
    """The documents of one half, or of both (None), in a fixed order; paragraphs are joined by a blank line.

    Raises InputError for an unknown half, or when this Python comes without its help topics.
    """
    if half is not None and half not in HALVES:
        raise InputError("unknown half of the default text", got=repr(half), expected=" or ".join(HALVES))
    return [text for name, text in _dealt() if half in (None, name)]


@cache
def _dealt() -> tuple[tuple[str, str], ...]:
    """(half, document): the longest first, each to the half that has less so far; ties by topic name."""
    prose = _prose()
    size = dict.fromkeys(HALVES, 0)
    dealt = []
    for topic in sorted(prose, key=lambda topic: (-len(prose[topic]), topic)):
        half = min(HALVES, key=size.__getitem__)
        size[half] += len(prose[topic])
        dealt.append((half, prose[topic]))
    return tuple(dealt)


def _prose() -> dict[str, str]:
    """Topic → its paragraphs of prose. Short topics come first, so a chapter loses what a section of it
    has.
    """
    topics = _topics()
    seen: set[str] = set()
    prose = {}
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        kept = []
        for block in re.split(r"\n\s*\n", topics[topic]):
            paragraph = _unwrapped(block)
            if _is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        if kept:
            prose[topic] = "\n\n".join(kept)
    return prose


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics  # optional: some distributions split it off
    except ImportError as error:
        raise InputError(
            "this Python comes without its help topics, the default text",
            remedy="name a text file or folder as the source, or install the full Python package",
        ) from error
    return topics


def _unwrapped(block: str) -> str:
    text = re.sub(r"\s+", " ", block).strip()
    text = re.sub(r"^([*•]|\d+\.|\[\d+\])\s+", "", text)
    return re.sub(r"(?<![\w*])\*{1,2}(\w[^*]*?)\*{1,2}(?![\w*])", r"\1", text)


def _is_prose(text: str) -> bool:
    if re.search(r"::=|>>>|^Changed in version|^New in version|^Added in version|\*\*\*|===|---", text):
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text.split()) >= 8 and text[-1] in ".:!?)" and letters >= 0.85 * len(text)
