"""Packing, pinned by its bytes; every number of bits there and back."""

from __future__ import annotations

import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels.packing.spec import BITS, SHAPES, TRITS, inputs
from tests.tolerance import same


def uint8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


# By hand from the definition: the largest plane first and with the low bits; codes a plane's length apart share a byte.
PINNED = (
    (1, [1, 0, 0, 0, 1, 1, 0, 1], [0b10110001]),
    (2, [0, 1, 2, 3, 3, 2, 1, 0], [0b01_11_10_00, 0b00_10_11_01]),
    (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b10_00_10_00, 0b11_01_11_01, 0b11110000]),
    (4, [0, 1, 2, 3, 12, 13, 14, 15], [0xC0, 0xD1, 0xE2, 0xF3]),
    (5, [0, 1, 2, 3, 16, 17, 18, 31], [0x00, 0x11, 0x22, 0xF3, 0b11110000]),
    (6, [0, 17, 34, 51, 63, 48, 32, 16], [0xF0, 0x01, 0x02, 0x03, 0b10_11_10_00, 0b01_11_11_01]),
    (7, [0, 0, 0, 0, 0, 0, 0, 127], [0x00, 0x00, 0x00, 0xF0, 0x00, 0b11_00_00_00, 0b10000000]),
    (8, [1, 2, 3, 250, 5, 6, 7, 255], [1, 2, 3, 250, 5, 6, 7, 255]),
)


@pytest.mark.parametrize(("bits", "codes", "expected"), PINNED)
def test_the_bytes(bits: int, codes: list[int], expected: list[int]) -> None:
    same(ops.pack(uint8(*codes), bits), uint8(*expected))


def test_the_bytes_of_32_codes_of_4_bits() -> None:
    codes = torch.arange(32, dtype=torch.uint8) % 16
    same(ops.pack(codes.flip(0), 4), uint8(*(15 - j | 15 - j << 4 for j in range(16))))


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([2, 1, 0, 2, 1], [2 + 3 * 1 + 9 * 0 + 27 * 2 + 81 * 1]),
        ([1, 2, 0, 1, 2, 2], [1 + 3 * 0 + 9 * 2, 2 + 3 * 1 + 9 * 2]),
        ([2] * 5, [242]),
    ],
)
def test_the_bytes_of_trits(codes: list[int], expected: list[int]) -> None:
    """Six codes take two bytes, of codes 0, 2, 4 and 1, 3, 5."""
    same(ops.pack_trits(uint8(*codes)), uint8(*expected))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_there_and_back(bits: int, shape: tuple[int, ...]) -> None:
    codes = inputs(shape, kinds=2**bits)
    packed = ops.pack(codes, bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    same(ops.unpack(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("shape", TRITS, ids=str)
def test_trits_there_and_back(shape: tuple[int, ...]) -> None:
    codes = inputs(shape, kinds=3)
    packed = ops.pack_trits(codes)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 5))
    same(ops.unpack_trits(packed, shape[-1]), codes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.pack(torch.zeros(12, dtype=torch.uint8), 4)
    for bits in (0, 9):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            ops.pack(torch.zeros(8, dtype=torch.uint8), bits)
