"""Codecs: known distortions, exact cases, bytes, hostile numbers, and that appending is concatenation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool.encoding.codecs import (
    FLOATS,
    Affine,
    Codec,
    Delta,
    Levels,
    Nested,
    Parts,
    Polar,
    Raw,
    Sketched,
    Split,
    Ternary,
)
from tests.tolerance import close, same

# Lloyd–Max quantisers of a unit normal: bits → the upper half of the centroids, distortion.
LLOYD = {
    1: ([0.7979], 0.3634),
    2: ([0.4528, 1.5104], 0.1175),
    3: ([0.2451, 0.7560, 1.3439, 2.1519], 0.03455),
    4: ([0.1284, 0.388, 0.6568, 0.9423, 1.2562, 1.618, 2.069, 2.7326], 0.0095),
}
SIGNS = torch.tensor([-1.0, 1.0])


def lloyd(bits: int) -> torch.Tensor:
    half = torch.tensor(LLOYD[bits][0])
    return torch.cat([-half.flip(0), half])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(codec: Codec, z: torch.Tensor) -> torch.Tensor:
    back = codec.decode(codec.encode(z), z.shape[-1])
    assert back.shape == z.shape
    assert back.dtype == torch.float32
    return back


def distortion(codec: Codec, z: torch.Tensor) -> float:
    return float((there_and_back(codec, z) - z).square().mean() / z.square().mean())


def fixed(kv_heads: int, width: int, group: int = 1, *, zero: bool = True) -> Levels:
    scale = 1 + normal(kv_heads, width // group).abs()
    return Levels(lloyd(3), group, "channel", "fixed", scale, 0.3 * normal(kv_heads, width // group) if zero else None)


GROUP = 32
CODECS: dict[str, Codec] = {
    "model": Raw(),
    **{name: Raw(name) for name in FLOATS},
    **{f"affine-{bits}-{axis}": Affine(bits, GROUP, axis) for bits in (1, 2, 3, 4, 8) for axis in ("token", "channel")},
    "affine-clipped": Affine(2, GROUP, "channel", clip=0.8),
    **{f"{ranges}-{axis}": Levels(lloyd(2), GROUP, axis, ranges)
       for ranges in ("minmax", "moments") for axis in ("token", "channel")},
    **{f"signs-{axis}": Levels(SIGNS, GROUP, axis, "absolute") for axis in ("token", "channel")},
    "fixed": fixed(2, 64),
    "fixed-shared": fixed(1, 64, 8, zero=False),
    **{f"ternary-{axis}": Ternary(GROUP, axis) for axis in ("token", "channel")},
    **{f"norm-{axis}": Levels(lloyd(2), GROUP, axis, "norm") for axis in ("token", "channel")},
    **{f"peak-{axis}": Levels(torch.linspace(-1, 1, 8), GROUP, axis, "peak") for axis in ("token", "channel")},
    "norm-corrected": Levels(lloyd(3), GROUP, "channel", "norm", renormalise=True),
}  # fmt: skip
OWN_RANGES = [name for name in CODECS if not name.startswith("fixed") and name not in FLOATS and name != "model"]
MADE_OF_OTHERS: dict[str, Codec] = {
    "split": Split((Levels(lloyd(3), 16, "channel", "norm"), Affine(2, 24, "channel"), Raw()), (16, 24, 24)),
    "split-token": Split((Affine(2, 8, "token"), Affine(1, GROUP, "token")), (40, 24)),
    "delta": Delta(Affine(8, GROUP, "channel"), Affine(4, GROUP, "channel"), 4),
    "delta-token": Delta(Affine(8, 8, "token"), Ternary(8, "token"), 4),
    "polar": Polar(4, 3, GROUP),
    "nested": Nested((4, 3, 2)),
    "sketched": Sketched(Levels(lloyd(2), 64, "channel", "norm"), normal(64, 128, seed=3)),
}
CODECS |= MADE_OF_OTHERS
EACH = pytest.mark.parametrize("name", CODECS)
GAUSSIAN = normal(1, 4, 512, 128)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", LLOYD)
def test_lloyd_max(bits: int, axis: str) -> None:
    """Groups of 128 know their mean and deviation only so well: a bit better than the distribution's."""
    whole = Levels(lloyd(bits), 1, "channel", "fixed", torch.ones(1, 128))
    assert distortion(whole, GAUSSIAN) == pytest.approx(LLOYD[bits][1], rel=0.02)
    own = Levels(lloyd(bits), 128, axis, "moments")  # type: ignore[arg-type]
    assert distortion(own, GAUSSIAN) == pytest.approx(LLOYD[bits][1], rel=0.03)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_codes_may_stand_for_other_numbers_than_choose_them(axis: str) -> None:
    plain = Levels(lloyd(2), 32, axis)  # type: ignore[arg-type]
    other = dataclasses.replace(plain, restored=2 * lloyd(2) + 1)
    first, second = (codec.encode(GAUSSIAN) for codec in (plain, other))
    for name, part in first.items():
        same(second[name], part)
    grouped = GAUSSIAN.unflatten(2 if axis == "token" else 3, (-1, 32))
    along = 3 if axis == "token" else 4
    low, high = grouped.amin(along, keepdim=True), grouped.amax(along, keepdim=True)
    half, middle = ((x / 2).expand_as(grouped).reshape_as(GAUSSIAN) for x in (high - low, high + low))
    expected = 2 * (there_and_back(plain, GAUSSIAN) - middle) + half + middle
    close(there_and_back(other, GAUSSIAN), expected, torch.float16)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(("group", "expected"), [(16, 0.107), (32, 0.154), (64, 0.203), (128, 0.250)])
def test_minmax_at_two_bits(group: int, expected: float, axis: str) -> None:
    assert distortion(Affine(2, group, axis), GAUSSIAN) == pytest.approx(expected, rel=0.02)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_signs_and_trits(axis: str) -> None:
    """Groups of 32 fit their scale a little better than a Gaussian's own."""
    signs = Levels(SIGNS, 128, axis, "absolute")  # type: ignore[arg-type]
    assert distortion(signs, GAUSSIAN) == pytest.approx(0.360, rel=0.02)
    assert distortion(Ternary(128, axis), GAUSSIAN) == pytest.approx(0.21, rel=0.03)  # type: ignore[arg-type]


def test_a_ternary_code_takes_the_best_scale() -> None:
    """No other factor of the same codes comes closer."""
    z = normal(1, 1, 32, 64)
    back = there_and_back(Ternary(32, "channel"), z)
    for factor in (0.97, 1.03):
        assert float((back * factor - z).norm()) > float((back - z).norm())


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_exact_cases(axis: str) -> None:
    pick = torch.Generator().manual_seed(0)

    def of(values: list[float], *ends: float) -> torch.Tensor:
        z = torch.tensor(values)[torch.randint(len(values), (1, 2, 64, 64), generator=pick)]
        along = z if axis == "token" else z.transpose(2, 3)
        for index, end in enumerate(ends):
            along[:, :, index::16] = end  # in every group
        return z

    for codec, z in (
        (Affine(2, 16, axis), of([-1.5, -0.75, 0.0, 0.75], -1.5, 0.75)),  # type: ignore[arg-type]
        (Levels(SIGNS, 16, axis, "absolute"), of([-0.625, 0.625])),  # type: ignore[arg-type]
        (Levels(torch.tensor([-1, 0.5, 0.75, 1]), 16, axis), of([-2, 1, 1.5, 2], -2, 2)),  # type: ignore[arg-type]
        (Ternary(16, axis), of([-3.0, 0.0, 3.0], 3.0)),  # type: ignore[arg-type]
    ):
        same(there_and_back(codec, z), z)


def test_columns_that_are_affine_images_of_the_levels_are_exact() -> None:
    codec = fixed(2, 64)
    assert codec.scale is not None
    assert codec.zero is not None
    picked = codec.levels[torch.randint(8, (1, 2, 63, 64), generator=torch.Generator().manual_seed(0))]
    z = picked * codec.scale[None, :, None] + codec.zero[None, :, None]
    close(there_and_back(codec, z), z)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.25, 60000.0])
@pytest.mark.parametrize("name", [*(name for name in OWN_RANGES if "norm" not in name), "model", "float16"])
def test_equal_numbers_are_exact(name: str, value: float) -> None:
    if name == "affine-clipped" and value:
        return  # clipping also moves a range of one number
    z = torch.full((1, 2, GROUP, 64), value)
    z[0, 0] = -z[0, 0]
    same(there_and_back(CODECS[name], z), z)


@pytest.mark.parametrize("size", [1e-40, 1e-9, 1e-5, 6e4, 1e6, 1e30])
@EACH
def test_hostile_numbers(name: str, size: float) -> None:
    """Finite whatever comes, and no further off than the numbers are large."""
    for z in (normal(1, 2, GROUP, 64).clamp(-1, 1) * size, torch.zeros(1, 2, GROUP, 64)):
        back = there_and_back(CODECS[name], z)
        assert bool(back.isfinite().all())
        if name in [*OWN_RANGES, "split", "split-token", "delta", "delta-token"] and size < 1e30:
            assert float((back - z).abs().max()) <= 2 * size


@EACH
def test_zeros_are_exact(name: str) -> None:
    if not name.startswith("fixed"):
        same(there_and_back(CODECS[name], torch.zeros(1, 2, GROUP, 64)), torch.zeros(1, 2, GROUP, 64))


@pytest.mark.parametrize("name", OWN_RANGES)
def test_groups_share_nothing(name: str) -> None:
    """A constant, a zero and a huge group beside a normal one leave it as it is."""
    z = normal(1, 2, 4 * GROUP, 128, seed=2)
    mixed = z.clone()
    parts = mixed.split(GROUP, 3 if CODECS[name].block == 1 else 2)
    parts[0].fill_(2.0)
    parts[1].zero_()
    parts[2].mul_(5e3)
    expected, actual = (there_and_back(CODECS[name], x).split(GROUP, 3 if CODECS[name].block == 1 else 2)[3]
                        for x in (z, mixed))  # fmt: skip
    same(actual, expected)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_more_bits_are_closer(axis: str) -> None:
    affine = [distortion(Affine(bits, GROUP, axis), GAUSSIAN) for bits in range(1, 9)]  # type: ignore[arg-type]
    tables = [distortion(Levels(lloyd(bits), GROUP, axis, "moments"), GAUSSIAN) for bits in LLOYD]  # type: ignore[arg-type]
    for errors in (affine, tables):
        assert errors == sorted(errors, reverse=True)


def joined(first: Parts, second: Parts) -> Parts:
    assert first.keys() == second.keys()
    return {name: torch.cat([first[name], second[name]], dim=2) for name in first}


@EACH
def test_appending_is_concatenation(name: str) -> None:
    codec, z = CODECS[name], normal(2, 2, 3 * GROUP, 64)
    whole = codec.encode(z)
    for cut in (0, GROUP, 2 * GROUP):
        parts = joined(codec.encode(z[:, :, :cut]), codec.encode(z[:, :, cut:]))
        for part, tensor in whole.items():
            same(parts[part].float(), tensor.float())
            assert parts[part].dtype == tensor.dtype
    for tensor in whole.values():
        assert tensor.shape[0] == 2
        assert 3 * GROUP % tensor.shape[2] == 0  # each index holds so many entries, no index part of one
        assert codec.block % (3 * GROUP // tensor.shape[2]) == 0


@EACH
def test_nothing_to_write(name: str) -> None:
    assert there_and_back(CODECS[name], torch.zeros(2, 2, 0, 64)).shape == (2, 2, 0, 64)


@pytest.mark.parametrize("name", [name for name in CODECS if CODECS[name].block == 1])
def test_one_entry_at_a_time(name: str) -> None:
    z = normal(1, 2, 3, 64)
    alone = [there_and_back(CODECS[name], z[:, :, index : index + 1]) for index in range(3)]
    close(torch.cat(alone, 2), there_and_back(CODECS[name], z))


@EACH
def test_kernels_read_what_decoding_gives(name: str) -> None:
    codec, z = CODECS[name], normal(1, 2, 64, 64)
    parts = codec.encode(z)
    packed = codec.packed(parts)
    if packed is None:
        assert isinstance(codec, (Ternary, Split, Delta, Nested, Polar, Sketched))
    elif isinstance(packed, torch.Tensor):
        same(packed.float(), codec.decode(parts, 64))
    else:
        assert (packed.tokens, packed.width) == (64, 64)


@pytest.mark.parametrize("width", [5, 12, 20])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_widths_that_fill_no_byte(axis: str, width: int) -> None:
    """Neighbours of the padding are coded as without it."""
    group = 8 if axis == "token" else 1 if width == 5 else 4
    wide, table = normal(1, 2, 16, -(-width // 8) * 8, seed=4), lloyd(4)
    codecs = [Affine(4, group, axis), Levels(table, group, axis, "moments"), Ternary(group, axis)]  # type: ignore[arg-type]
    for codec in codecs:
        codec.check(2, width)
        same(there_and_back(codec, wide[..., :width]), there_and_back(codec, wide)[..., :width])


@pytest.mark.parametrize("zero", [False, True])
def test_fixed_ranges_of_widths_that_fill_no_byte(zero: bool) -> None:
    codec, z = fixed(2, 12, zero=zero), normal(1, 2, 9, 12)
    codec.check(2, 12)
    assert codec.scale is not None
    shift = 0 if codec.zero is None else codec.zero[None, :, None]
    levels = codec.levels * codec.scale[None, :, None, :, None] + (shift[..., None] if zero else 0)
    best = (levels - z[..., None]).abs().min(-1).values
    close((there_and_back(codec, z) - z).abs(), best)


@pytest.mark.parametrize("indices", [[1], [2, 0]], ids=str)
def test_some_heads(indices: list[int]) -> None:
    z = normal(1, 3, 8, 64)
    own, shared = fixed(3, 64), fixed(1, 64)
    parts = Split((fixed(3, 32), Levels(SIGNS, 32, "channel", "norm")), (32, 32))
    within = Delta(fixed(3, 64), Affine(4, 64, "channel"), 4)
    for codec in (own, shared, parts, within, CODECS["moments-channel"], CODECS["sketched"]):
        same(there_and_back(codec.heads(indices), z[:, indices]), there_and_back(codec, z)[:, indices])
    assert not torch.equal(own.heads([0]).scale, own.heads([1]).scale)  # type: ignore[arg-type]
