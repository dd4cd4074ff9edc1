"""Bits that codecs take, from the bytes of what they write, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvtool.encoding.codecs import (
    Affine,
    Codec,
    Delta,
    Levels,
    Nested,
    Polar,
    Raw,
    Sketched,
    Split,
    Ternary,
)
from kvtool.encoding.codecs.sketched import signs
from kvtool.errors import InputError
from tests.encoding.test_codecs import MADE_OF_OTHERS, SIGNS, fixed, lloyd, normal

# bits an element, from the bytes of the parts: codes and one 16-bit scale, or scale and zero, for each group
BITS = (
    *((Affine(bits, 32, axis), bits + 32 / 32) for bits in range(1, 9) for axis in ("token", "channel")),
    *((Affine(2, group, axis), 2 + 32 / group) for group in (64, 128) for axis in ("token", "channel")),
    *((Levels(lloyd(bits), 32, "token", "moments"), bits + 1.0) for bits in (2, 3, 4)),
    *((Levels(lloyd(bits), 128, "channel", "minmax"), bits + 0.25) for bits in (2, 3, 4)),
    *((Levels(SIGNS, 32, axis, "absolute"), 1 + 16 / 32) for axis in ("token", "channel")),
    (Levels(lloyd(3), 1, "channel", "fixed", torch.ones(1, 128), torch.zeros(1, 128)), 3.0),
    (Ternary(32, "token"), 7 * 8 / 32 + 16 / 32),  # seven bytes hold up to 35 trits
    (Ternary(128, "token"), 26 * 8 / 128 + 16 / 128),
    (Ternary(32, "channel"), 26 * 8 / 128 + 16 / 32),
    *((Levels(lloyd(bits), 128, "channel", "norm", renormalise=True), bits + 16 / 128) for bits in (1, 2, 3, 4)),
    (Split((Levels(lloyd(3), 32, "channel", "norm"), Levels(lloyd(2), 96, "channel", "norm")), (32, 96)),
     (32 * 3 + 96 * 2) / 128 + 2 * 16 / 128),
    (Polar(4, 4, 128), (4 + 4) / 2 + 4 * 16 / (2 * 128)),
    (Polar(3, 5, 32), (3 + 5) / 2 + 4 * 16 / (2 * 32)),
    (Nested((4, 2, 2, 2)), 4 / 2 + 2 / 4 + 2 / 8 + 2 / 16 + 16 / 16),
    (Delta(Affine(8, 128, "channel"), Affine(4, 128, "channel"), 8), (8.25 + 7 * 4.25) / 8),
    (Sketched(Levels(lloyd(2), 128, "channel", "norm"), torch.zeros(128, 256)), 2 + 16 / 128 + (256 + 16) / 128),
    (signs(128), 1 + 16 / 128),
    (Raw("float16"), 16.0),
    (Raw("float8_e4m3fn"), 8.0),
)  # fmt: skip


def bits_of(codec: Codec, width: int) -> float:
    z = normal(2, 3, 128, width)
    return sum(tensor.nbytes for tensor in codec.encode(z).values()) * 8 / z.numel()


@pytest.mark.parametrize(("codec", "expected"), BITS)
def test_bits_an_element(codec: Codec, expected: float) -> None:
    assert bits_of(codec, 128) == expected


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("width", [64, 128])
def test_the_budgets_of_the_published_settings(width: int, axis: str) -> None:
    assert bits_of(Affine(2, 32, axis), width) <= 3.03  # type: ignore[arg-type]
    assert bits_of(Affine(4, 32, axis), width) <= 5.03  # type: ignore[arg-type]
    assert bits_of(Ternary(32, axis), width) <= 2.6  # type: ignore[arg-type]
    assert bits_of(Ternary(32, "channel"), 64) == 13 * 8 / 64 + 16 / 32


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Raw("int8"), "unknown number type"),
        (lambda: Affine(0, 32, "token"), "bad bits"),
        (lambda: Affine(9, 32, "token"), "bad bits"),
        (lambda: Affine(2, 0, "channel"), "bad group"),
        (lambda: Affine(2, 24, "token"), "bad group along tokens"),
        (lambda: Affine(2, 32, "entry"), "bad axis"),  # type: ignore[arg-type]
        (lambda: Levels(torch.zeros(3), 32, "token"), "table of levels"),
        (lambda: Levels(torch.zeros(1), 32, "token"), "bad bits"),
        (lambda: Levels(SIGNS, 1, "channel", "fixed"), "needs `scale`"),
        (lambda: Levels(SIGNS, 1, "channel", "minmax", torch.ones(1, 8)), "needs `scale`"),
        (lambda: Levels(SIGNS, 8, "token", "fixed", torch.ones(1, 8)), "fixed ranges are per channel"),
        (lambda: Ternary(12, "token"), "bad group along tokens"),
        (lambda: Levels(SIGNS, 8, "channel", "absolute", renormalise=True), "norms can be corrected"),
        (lambda: Levels(SIGNS, 8, "channel", restored=torch.zeros(4)), "bad restored levels"),
        (lambda: Split((Raw(), Raw()), (8,)), "each codec has its channels"),
        (lambda: Split((), ()), "each codec has its channels"),
        (lambda: Split((Raw(),), (0,)), "each codec has its channels"),
        (lambda: Delta(Raw(), Raw(), 1), "bad group of differences"),
        (lambda: Polar(0, 4), "bad bits"),
        (lambda: Polar(4, 9), "bad bits"),
        (lambda: Polar(4, 4, 24), "bad group along tokens"),
    ],
)
def test_refusals(made: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made()


@pytest.mark.parametrize(
    ("codec", "width"),
    [(Affine(2, 32, "channel"), 48), (Affine(2, 12, "channel"), 12), (Levels(SIGNS, 32, "channel"), 48),
     (Ternary(32, "channel"), 48), (fixed(2, 64), 56), (fixed(3, 64), 64), (MADE_OF_OTHERS["split"], 63),
     (Split((Affine(2, 32, "channel"), Raw()), (48, 16)), 64), (Delta(Raw(), Affine(2, 32, "channel")), 48),
     (Delta(Ternary(32, "channel"), Raw()), 48), (Polar(), 63), (MADE_OF_OTHERS["sketched"], 32),
     (Sketched(Levels(SIGNS, 32, "channel"), torch.zeros(48, 48)), 48)],
)  # fmt: skip
def test_widths_that_do_not_fit(codec: Codec, width: int) -> None:
    with pytest.raises(InputError, match=r"divide the width|another shape|of a split|in pairs|another width"):
        codec.check(2, width)
