"""Entropy coding: back bit for bit, as short as the frequencies allow, and damage is noticed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.encoding import squeeze
from kvtool.encoding.codecs import Affine, Delta, Levels, Polar, Raw, Split, Ternary
from kvtool.encoding.entropy import Stream, compressed, entropy, restored
from kvtool.errors import InputError
from kvtool.methods.cachegen import symmetric
from tests.tolerance import same


def drawn(rows: int, count: int, kinds: int, *, peaked: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Codes 0..kinds−1 of rows that differ: each row is a bell of its own width around the middle."""
    draw = torch.Generator().manual_seed(seed)
    width = kinds * (0.02 + 0.2 * torch.rand(rows, 1, generator=draw)) * peaked
    codes = kinds / 2 + width * torch.randn(rows, count, generator=draw)
    return codes.round().clamp(0, kinds - 1).to(torch.uint8)


@given(st.integers(0, 6), st.integers(0, 40), st.sampled_from([1, 2, 3, 12, 31, 256]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_there_and_back(rows: int, count: int, kinds: int, seed: int) -> None:
    codes = torch.randint(0, kinds, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    same(restored(compressed(codes)), codes)


@pytest.mark.parametrize("kinds", [2, 11, 31, 256])
def test_hardly_longer_than_the_entropy(kinds: int) -> None:
    codes = drawn(24, 4000, kinds)
    stream = compressed(codes)
    payload = 8 * stream.words.nbytes
    assert isinstance(stream.tables, Stream)  # each row has a table
    assert entropy(codes) <= payload <= 1.02 * entropy(codes) + 96
    assert stream.nbytes < codes.numel() * (kinds - 1).bit_length() / 8


def test_what_is_always_the_same_costs_nothing() -> None:
    for rows, count in ((1, 10), (7, 5000)):
        codes = torch.full((rows, count), 9, dtype=torch.uint8)
        stream = compressed(codes)
        assert stream.words.nbytes == 8
        assert stream.nbytes <= 8 + 10
        same(restored(stream), codes)


def test_a_constant_row_among_others_costs_nothing() -> None:
    codes = drawn(8, 3000, 31)
    with_constant = torch.cat([codes, torch.full((1, 3000), 4, dtype=torch.uint8)])
    assert abs(compressed(with_constant).words.nbytes - compressed(codes).words.nbytes) <= 8


def test_rows_that_are_alike_share_a_table() -> None:
    codes = torch.randint(0, 16, (200, 30), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    stream = compressed(codes)
    assert isinstance(stream.tables, torch.Tensor)
    assert len(stream.tables) == 1


def test_a_code_that_comes_once_among_many_comes_back() -> None:
    codes = torch.zeros(1, 200_000, dtype=torch.uint8)
    codes[0, 77_777] = 255
    stream = compressed(codes)
    same(restored(stream), codes)
    assert stream.words.nbytes < 40


def test_damage_is_told() -> None:
    stream = compressed(drawn(4, 500, 31))
    for words in (stream.words[:-1], stream.words[:1], torch.cat([stream.words, stream.words[:1]])):
        with pytest.raises(InputError, match="damaged stream"):
            restored(dataclasses.replace(stream, words=words))


WIDE = torch.linspace(-1, 1, 8)
CODECS = {
    "affine-token": Affine(3, 8, "token"),
    "affine-channel": Affine(5, 8, "channel"),
    "peak": symmetric(32, 16),
    "delta": Delta(symmetric(256, 16), symmetric(12, 16), 4),
    "split": Split((Affine(4, 8, "token"), Levels(WIDE, 8, "channel")), (8, 8)),
    "polar": Polar(3, 5, 8),
    "ternary": Ternary(8, "token"),
    "raw": Raw("float16"),
}


@pytest.mark.parametrize("name", CODECS)
def test_parts_come_back(name: str) -> None:
    codec = CODECS[name]
    x = torch.randn(2, 3, 400, 16, generator=torch.Generator().manual_seed(2))
    parts = codec.encode(x * torch.linspace(0.01, 3, 16))
    short = squeeze.squeezed(codec, parts)
    coded = {part for part, value in short.items() if isinstance(value, squeeze.Codes)}
    assert coded == set(codec.codes)  # numbers of a bell are worth coding
    for part, value in parts.items():
        held = short[part]
        same(squeeze.expanded(held) if isinstance(held, squeeze.Codes) else held, value)


def test_what_would_not_be_shorter_stays() -> None:
    codec = Affine(8, 8, "channel")
    draw = torch.Generator().manual_seed(3)
    parts = codec.encode(torch.rand(1, 1, 8, 8, generator=draw))
    assert squeeze.squeezed(codec, parts) == parts


def test_a_channel_is_a_row() -> None:
    """Planted: of 16 channels one is constant, so that its codes are; the others are noise."""
    codec = symmetric(32, 16)
    x = torch.randn(1, 1, 2000, 16, generator=torch.Generator().manual_seed(4))
    bits = []
    for scale in (1.0, 0.0):
        x[..., 5] *= scale
        held = squeeze.squeezed(codec, codec.encode(x))["codes"]
        assert isinstance(held, squeeze.Codes)
        bits.append(8 * held.stream.words.nbytes / 2000)
    assert bits[0] - bits[1] == pytest.approx(bits[0] / 16, rel=0.1)
