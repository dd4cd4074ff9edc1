"""Codecs made of others, and levels of a unit normal: known answers. Their laws are in test_codecs.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvtool.encoding.codecs import Affine, Codec, Delta, Levels, Nested, Polar, Raw, Sketched, Split
from kvtool.encoding.fitted import Ranges
from kvtool.encoding.tables import normal as table
from kvtool.errors import InputError
from tests.encoding.test_codecs import GAUSSIAN, LLOYD, distortion, fixed, normal, there_and_back
from tests.tolerance import close, same


def norms(z: torch.Tensor) -> torch.Tensor:
    return z.norm(dim=-1)


# --- levels of a unit normal


@pytest.mark.parametrize("bits", LLOYD)
def test_the_table_of_a_unit_normal(bits: int) -> None:
    upper, loss = LLOYD[bits]
    assert table(bits)[2 ** (bits - 1) :].tolist() == pytest.approx(upper, abs=1e-4)
    same(table(bits), -table(bits).flip(0))
    assert distortion(Levels(table(bits), 1, "channel", "fixed", torch.ones(1, 128)), GAUSSIAN) == pytest.approx(
        loss, rel=0.02
    )


def test_more_bits_have_more_levels_and_lose_a_quarter_as_much() -> None:
    """Panter and Dite: √3·π/2 · 4^−bits, from below."""
    limit = math.sqrt(3) * math.pi / 2
    shares = [distortion(Levels(table(b), 1, "channel", "fixed", torch.ones(1, 128)), GAUSSIAN) * 4**b / limit
              for b in range(1, 9)]  # fmt: skip
    assert shares == sorted(shares)
    assert 0.5 < shares[0] < shares[-1] < 1.02


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("bits", LLOYD)
def test_ranges_that_are_norms(bits: int, renormalise: bool) -> None:
    """Rotated entries of any direction and length lose what a unit normal does, one scale each."""
    lengths = torch.logspace(-3, 3, 512)[None, None, :, None]
    codec = Levels(table(bits), 128, "channel", "norm", renormalise=renormalise)
    back = there_and_back(codec, GAUSSIAN * lengths)
    loss = (back / lengths - GAUSSIAN).square().mean() / GAUSSIAN.square().mean()
    if not renormalise:
        assert float(loss) == pytest.approx(LLOYD[bits][1], rel=0.03)
    kept = norms(back) / norms(GAUSSIAN * lengths)
    if renormalise:
        close(kept, torch.ones_like(kept), torch.float16)
    else:
        assert float(kept.mean()) < 1  # levels are means of their cells: they shrink


def test_a_norm_ignores_the_direction_of_ties() -> None:
    """Scaling an entry scales what comes back; turning its sign turns it."""
    codec = Levels(table(3), 64, "channel", "norm", renormalise=True)
    z = normal(1, 2, 16, 64, seed=5)
    close(there_and_back(codec, 8 * z), 8 * there_and_back(codec, z), torch.float16)
    same(there_and_back(codec, -z), -there_and_back(codec, z))


# --- Split


def test_a_split_is_its_parts_side_by_side() -> None:
    z = normal(2, 3, 8, 48)
    first, second = Affine(3, 16, "channel"), Levels(table(2), 32, "channel", "moments")
    expected = torch.cat([there_and_back(first, z[..., :16]), there_and_back(second, z[..., 16:])], -1)
    same(there_and_back(Split((first, second), (16, 32)), z), expected)


def test_bits_go_where_they_matter() -> None:
    """Planted: the first 16 channels are ten times as large. At equal bytes a split that knows loses far less."""
    z = normal(1, 2, 64, 64)
    z[..., :16] *= 10
    codes = [Levels(table(bits), group, "channel", "norm") for bits, group in ((4, 16), (2, 48), (2, 16), (4, 48))]
    knowing, wrong = Split((codes[0], codes[1]), (16, 48)), Split((codes[2], codes[3]), (16, 48))
    assert distortion(knowing, z) < 0.15 * distortion(wrong, z)


def test_a_split_of_lossless_parts_is_lossless() -> None:
    assert Split((Raw(), Raw()), (8, 8)).lossless
    assert not Split((Raw(), Affine(8, 8, "channel")), (8, 8)).lossless


@pytest.mark.parametrize(
    ("codec", "block"),
    [(Split((Affine(2, 8, "token"), Affine(2, 32, "token")), (8, 8)), 32),
     (Split((Affine(2, 8, "channel"), Raw()), (8, 8)), 1),
     (Delta(Raw(), Raw(), 10), 10), (Delta(Affine(8, 8, "token"), Raw(), 10), 80),
     (Delta(Raw(), Affine(4, 8, "token"), 9), 9), (Delta(Raw(), Affine(4, 8, "token"), 10), 80),
     (Delta(Affine(8, 8, "token"), Affine(4, 16, "token"), 5), 40), (Polar(4, 4, 64), 64)],
)  # fmt: skip
def test_blocks(codec: Codec, block: int) -> None:
    assert codec.block == block
    assert there_and_back(codec, normal(1, 2, 2 * block, 16)).shape[2] == 2 * block


# --- Delta


def test_entries_like_their_anchor_are_the_anchor() -> None:
    z = normal(1, 2, 8, 32).repeat_interleave(10, dim=2)
    codec = Delta(Raw(), Affine(2, 32, "channel"), 10)
    same(there_and_back(codec, z), z)
    parts = codec.encode(z)
    assert not parts["rest.codes"].any()  # all differences are 0
    assert not parts["rest.zero"].any()


def test_differences_are_to_the_anchor_as_it_is_read_back() -> None:
    """So a coarse anchor's error does not reach the others: theirs is that of their own code."""
    z = normal(1, 2, 40, 32)
    coarse, fine = (Delta(Affine(bits, 32, "channel"), Raw("float32"), 10) for bits in (1, 8))
    others = torch.arange(40) % 10 != 0
    for codec in (coarse, fine):
        close(there_and_back(codec, z)[:, :, others], z[:, :, others])
    assert distortion(coarse, z) > 10 * distortion(fine, z)


def test_neighbours_that_resemble_each_other_lose_less() -> None:
    """A slow walk: 3 bits of a difference are worth more than 3 bits of the number."""
    z = normal(1, 2, 160, 32) + 30 * normal(1, 2, 1, 32, seed=1)
    plain, delta = Affine(3, 32, "channel"), Delta(Affine(8, 32, "channel"), Affine(3, 32, "channel"), 10)
    assert distortion(delta, z) < 0.05 * distortion(plain, z)


# --- Polar


def test_equal_radii_are_exact() -> None:
    """On a circle all that is lost is the angle, at most half a cell."""
    angle = 6 * torch.rand(1, 2, 128, 16, generator=torch.Generator().manual_seed(0))
    z = 1.5 * torch.cat([angle.cos(), angle.sin()], -1)
    back = there_and_back(Polar(4, 4, 32), z)
    first, second = back.chunk(2, -1)
    close(torch.hypot(first, second), torch.full_like(first, 1.5))
    turned = (torch.atan2(second, first) - angle + math.pi).remainder(2 * math.pi) - math.pi
    bound = 2 * math.pi / 2**4 / 2  # of a range that is at most all angles
    assert 0.5 * bound < float(turned.abs().max()) <= bound


def test_cells_come_back_as_their_middle() -> None:
    """Floor, then half a cell: of [1, 2] in two cells both ends of a cell become 1.25 or 1.75."""
    radius = torch.tensor([1.0, 1.0625, 1.4375, 1.5625, 1.9375, 2.0, 1.25, 1.75])
    z = torch.stack([radius, torch.zeros(8)], -1)[None, None]
    expected = torch.tensor([1.25, 1.25, 1.25, 1.75, 1.75, 1.75, 1.25, 1.75])
    same(there_and_back(Polar(2, 1, 8), z)[0, 0, :, 0], expected)


def test_turning_by_rope_turns_the_code() -> None:
    """Pairs are those of RoPE: one angle more for all entries of a pair moves its range, not its codes."""
    angle, radius = (torch.rand(1, 1, 32, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    codec, wide = Polar(4, 4, 32), radius.repeat(1, 1, 1, 2)
    made = [codec.encode(wide * torch.cat([(angle + by).cos(), (angle + by).sin()], -1)) for by in (0.5, 3.0)]
    apart = (made[0]["angle.codes"] != made[1]["angle.codes"]).float().mean()
    assert float(apart) < 0.05  # but for numbers at a border
    close(made[0]["radius.scale"], made[1]["radius.scale"])


@pytest.mark.parametrize("field", ["angle", "radius"])
def test_more_bits_for_either_are_closer(field: str) -> None:
    errors = [distortion(replace(Polar(8, 8, 128), **{field: bits}), GAUSSIAN) for bits in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3


# --- Nested


def test_lengths_are_kept_and_angles_at_a_level_are_exact() -> None:
    """Turning loses no length; and what stands in the middle of its cells comes back."""
    codec, z = Nested((3, 2, 2)), normal(1, 2, 64, 32)
    back = there_and_back(codec, z)
    sixteenths = [x.unflatten(-1, (-1, 8)).norm(dim=-1) for x in (back, z)]
    close(sixteenths[0], sixteenths[1], torch.float16)
    close(there_and_back(codec, back), back, torch.float16)


@pytest.mark.parametrize("bits", [(1, 1, 1, 1), (4, 2, 2, 2), (3, 3, 3, 3)])
def test_what_turned_entries_lose(bits: tuple[int, ...]) -> None:
    """By definition: loops over channels, with cells found by Lloyd's rule on drawn angles, not on their density."""
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(8_000, 16, generator=draw, dtype=torch.float64)
    lost = torch.zeros(())
    x, tables = sample, []
    for level, count in enumerate(bits):
        angle = torch.atan2(x[:, 1::2], x[:, 0::2]).remainder(2 * math.pi)
        x = torch.hypot(x[:, 0::2], x[:, 1::2])
        table = (torch.arange(2**count) + 0.5) * 2 * math.pi / 2**count
        if level:
            flat = angle.flatten()
            table = flat.quantile((torch.arange(2**count) + 0.5).double() / 2**count)
            for _ in range(40):
                nearest = (flat[:, None] - table).abs().argmin(1)
                table = torch.stack([flat[nearest == at].mean() for at in range(2**count)])
        tables.append(table.double())
    for row in sample[:400]:
        angles, radii = [], row.tolist()
        for table in tables:
            pairs = list(zip(radii[0::2], radii[1::2], strict=True))
            turns = [math.atan2(b, a) % (2 * math.pi) for a, b in pairs]
            angles.append([float(table[(table - turn).abs().argmin()]) for turn in turns])
            radii = [math.hypot(a, b) for a, b in pairs]
        for level in reversed(angles):
            radii = [
                part for r, turn in zip(radii, level, strict=True) for part in (r * math.cos(turn), r * math.sin(turn))
            ]
        lost = lost + (torch.tensor(radii) - row).square().sum() / row.square().sum() / 400
    assert distortion(Nested(bits), GAUSSIAN) == pytest.approx(float(lost), rel=0.05)


def test_widths_that_cannot_be_halved() -> None:
    with pytest.raises(InputError, match="halved so often"):
        Nested((4, 2, 2, 2)).check(2, 24)
    with pytest.raises(InputError, match="without angles"):
        Nested(())


# --- Sketched


def orthogonal(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed))[0] * width**0.5


def test_sketched_products_are_unbiased() -> None:
    """A coarse code shrinks q·x; over sketches the mean with one is q·x itself."""
    z, q, draws = normal(1, 1, 8, 64, seed=1), normal(1, 64, seed=2), 400
    base, z = Levels(table(1), 64, "channel", "norm"), normal(1, 1, 8, 64, seed=1) + 0.5 * q
    true, plain = z @ q[0], there_and_back(base, z) @ q[0]
    seen = torch.stack([there_and_back(Sketched(base, orthogonal(64, seed)), z) @ q[0] for seed in range(draws)])
    error = seen.std(0) / draws**0.5
    assert bool((plain - true).abs().max() > 10 * error.max())
    assert bool(((seen.mean(0) - true).abs() < 4 * error + 0.01 * (plain - true).abs()).all())


@pytest.mark.parametrize(("bits", "loss"), [(1, 0.56), (2, 0.18), (3, 0.0543)])
def test_errors_of_products_with_a_gaussian_sketch(bits: int, loss: float) -> None:
    """In ‖q‖²‖x‖²/D, with one bit of the sketch more: π/2 of what the table loses, the published 0.56 and 0.18."""
    base, x, q = Levels(table(bits), 128, "channel", "norm"), normal(1, 1, 64, 128), normal(128, 64, seed=1)
    lengths = x.square().sum(-1).mean() * q.square().sum(0).mean() / 128
    errors = [(there_and_back(Sketched(base, normal(128, 128, seed=seed)), x) - x) @ q for seed in range(2, 10)]
    assert float(torch.stack(errors).square().mean() / lengths) == pytest.approx(loss, rel=0.1)


def test_the_norm_of_a_sketched_error_is_its_own() -> None:
    base, z = Levels(table(2), 64, "channel", "norm"), normal(1, 2, 8, 64)
    parts = Sketched(base, torch.cat([orthogonal(64, 0), orthogonal(64, 1)], -1)).encode(z)
    error = (z - there_and_back(base, z)).norm(dim=-1)
    close(parts["sketch.scale"][..., 0].float(), error, torch.float16)


# --- what is fitted to a prompt


def test_inner_codecs_are_fitted() -> None:
    z = normal(1, 2, 40, 16)
    split, delta = Split((Ranges(4), Raw()), (8, 8)), Delta(Ranges(4), Ranges(4), 10)
    for codec in (split, delta):
        assert codec.fits
        made = codec.fit(z)
        assert not made.fits
        assert distortion(made, z) < 0.01
    assert not Split((Raw(), Affine(2, 8, "channel")), (8, 8)).fits
    assert not Delta(Raw(), fixed(2, 16), 10).fits
