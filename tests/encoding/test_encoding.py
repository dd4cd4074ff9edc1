"""The encoding of a side: one after another, what it refuses, heads, and what attention may read directly."""

from __future__ import annotations

import pytest
import torch

from kvtool.encoding.codecs import Affine, Levels, Raw, Ternary
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.encoding.transforms import Gather, Hadamard, Join, Linear, Scale
from kvtool.errors import InputError
from tests.tolerance import close, same

HEADS, WIDTH = 4, 16
X = torch.randn(2, HEADS, 32, WIDTH, generator=torch.Generator().manual_seed(0))
CODED = Encoding(Affine(2, 8, "token"))
SCALED = Encoding(transforms=(Scale(torch.arange(1.0, 17).expand(HEADS, -1)),))
PAIRED = Encoding(transforms=(Scale(torch.arange(1.0, 9).repeat(HEADS, 2)),))
TURNED = Encoding(transforms=(Hadamard(),))
EVERYTHING = Encoding(
    Affine(2, 8, "token"), (Hadamard(),), Outliers(1, "token", 16), ErrorBasis(2, 32), rotated=False
)  # fmt: skip


def decoded(encoding: Encoding, x: torch.Tensor = X) -> torch.Tensor:
    return encoding.decode(encoding.encode(x), x.shape[-1])


def test_lossless_is_what_changes_nothing() -> None:
    assert Encoding().lossless
    assert Encoding(rotated=False).lossless
    same(decoded(Encoding()), X)
    outliers, basis = Outliers(1, "channel"), ErrorBasis(1, 8)
    for encoding in (CODED, SCALED, Encoding(Raw("float32")), Encoding(outliers=outliers), Encoding(error=basis)):
        assert not encoding.lossless


@pytest.mark.parametrize("other", [CODED, SCALED, EVERYTHING, Encoding(outliers=Outliers(1, "channel"))])
def test_nothing_then_something(other: Encoding) -> None:
    assert Encoding().then(other) is other
    assert other.then(Encoding()) is other


def test_transforms_then_a_codec() -> None:
    made = SCALED.then(TURNED).then(CODED)
    assert made == Encoding(CODED.codec, SCALED.transforms + TURNED.transforms)
    scale = SCALED.transforms[0]
    expected = scale.inverse(decoded(Encoding(CODED.codec, (Hadamard(),)), scale.forward(X)))
    same(decoded(made), expected)
    residuals = Encoding(CODED.codec, (), Outliers(1, "token", 8), ErrorBasis(1, 8))
    assert SCALED.then(residuals).outliers is residuals.outliers
    assert SCALED.then(residuals).error is residuals.error


@pytest.mark.parametrize("first", [CODED, Encoding(Raw("float16")), Encoding(outliers=Outliers(1, "channel"))])
def test_numbers_are_written_down_once(first: Encoding) -> None:
    with pytest.raises(InputError, match="write numbers down"):
        first.then(TURNED)


def test_the_side_of_rope() -> None:
    before = Encoding(CODED.codec, rotated=False)
    for first in (SCALED, TURNED, Encoding(transforms=(Join(2),))):
        with pytest.raises(InputError, match="same side of RoPE"):
            first.then(before)
    assert not PAIRED.then(before).rotated
    assert not Encoding(transforms=SCALED.transforms, rotated=False).then(before).rotated
    assert not Encoding(transforms=SCALED.transforms, rotated=False).then(CODED).rotated
    assert SCALED.then(CODED).rotated


@pytest.mark.parametrize(
    ("encoding", "block"),
    [
        (Encoding(), 1),
        (CODED, 8),
        (Encoding(Affine(2, 8, "channel")), 1),
        (Encoding(Ternary(32, "token"), outliers=Outliers(1, "token", 16)), 32),
        (Encoding(CODED.codec, outliers=Outliers(1, "channel"), error=ErrorBasis(1, 12)), 24),
        (EVERYTHING, 32),
    ],
)
def test_blocks_are_multiples_of_every_part(encoding: Encoding, block: int) -> None:
    assert encoding.block == block
    assert decoded(encoding, X[:, :, :1].expand(-1, -1, block, -1)).shape == (2, HEADS, block, WIDTH)


def test_what_attention_reads_directly() -> None:
    for encoding in (Encoding(), CODED, SCALED.then(CODED), Encoding(Raw("bfloat16"), (Join(2), Hadamard()))):
        assert encoding.direct
        assert encoding.packed(encoding.encode(X)) is not None
    outlying, corrected = Encoding(outliers=Outliers(1, "channel")), Encoding(CODED.codec, error=ErrorBasis(1, 8))
    for encoding in (outlying, corrected, Encoding(rotated=False), EVERYTHING):
        assert not encoding.direct
        assert encoding.packed(encoding.encode(X)) is None
    assert Encoding(Ternary(8, "token")).packed(Encoding(Ternary(8, "token")).encode(X)) is None


def test_residuals_are_those_of_what_was_transformed() -> None:
    """The error of a code of rank 2 in the turned basis is gone altogether."""
    encoding = Encoding(Affine(1, 8, "token"), (Hadamard(),), error=ErrorBasis(16, 32))
    close(decoded(encoding), X, torch.float16)
    assert float((decoded(Encoding(Affine(1, 8, "token"), (Hadamard(),))) - X).abs().max()) > 0.5


@pytest.mark.parametrize("indices", [[1], [3, 0]], ids=str)
def test_some_heads(indices: list[int]) -> None:
    scale = 1 + torch.rand(HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    fixed = Levels(torch.linspace(-1, 1, 8), 1, "channel", "fixed", 3 * scale, torch.zeros(HEADS, WIDTH))
    order = Gather(torch.stack([torch.arange(WIDTH).roll(head) for head in range(HEADS)]), WIDTH)
    for encoding in (Encoding(fixed, (Scale(scale), order)), EVERYTHING, CODED):
        own = encoding.heads(indices, HEADS)
        assert own.rotated == encoding.rotated
        same(decoded(own, X[:, indices]), decoded(encoding)[:, indices])


def test_heads_that_are_mixed_stay_together() -> None:
    joined = Encoding(transforms=(Join(2),))
    assert joined.heads([0, 1, 2, 3], HEADS) is joined
    with pytest.raises(InputError, match="mixes KV heads"):
        joined.heads([0, 1], HEADS)


def basis(heads: int, width: int, rank: int) -> Linear:
    return Linear(torch.zeros(heads, width, rank), torch.zeros(heads, rank, width))


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding(transforms=(Join(3),)), "multiple of 3"),
        (Encoding(transforms=(Join(2), Join(4))), "multiple of 8"),
        (Encoding(transforms=(basis(1, 8, 4),)), "another width"),
        (Encoding(transforms=(Join(2), basis(1, 16, 4))), "another width"),
        (Encoding(transforms=(basis(3, 16, 4),)), "3 heads"),
        (Encoding(transforms=(Join(2), basis(4, 32, 4))), "4 heads"),
        (Encoding(transforms=(Scale(torch.ones(1, 8)),)), "another width"),
        (Encoding(transforms=(Gather(torch.zeros(1, 4, dtype=torch.int64), 8),)), "another width"),
        (Encoding(transforms=(basis(1, 16, 12), Hadamard())), "power of two"),
        (Encoding(Affine(2, 32, "channel")), "divide the width"),
        (Encoding(Affine(2, 8, "channel"), (basis(1, 16, 12),)), "divide the width"),
        (Encoding(Affine(2, 12, "channel"), (basis(1, 16, 12),)), "divide the width"),
        (Encoding(Ternary(32, "channel")), "divide the width"),
        (Encoding(Levels(torch.ones(2), 1, "channel", "fixed", torch.ones(3, 16))), "another shape"),
    ],
)
def test_what_does_not_fit(encoding: Encoding, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoding.check(HEADS, WIDTH)


@pytest.mark.parametrize(
    "encoding",
    [Encoding(), EVERYTHING, SCALED, Encoding(Affine(2, 32, "channel"), (Join(2), basis(2, 32, 32))),
     Encoding(Affine(2, 4, "channel"), (basis(4, 16, 12),)), Encoding(Ternary(12, "channel"), (basis(1, 16, 12),)),
     Encoding(Affine(2, 8, "token"), (basis(1, 16, 5),))],
)  # fmt: skip
def test_what_fits_can_be_written(encoding: Encoding) -> None:
    encoding.check(HEADS, WIDTH)
    assert decoded(encoding).shape == X.shape
