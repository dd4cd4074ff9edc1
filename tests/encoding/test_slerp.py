"""One direction for two layers: known answers of MiniCache's card, and what no arc joins."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.encoding.codecs import Affine, Codec, Raw, Slerp
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from tests.tolerance import close, error, same

HEADS, ENTRIES, WIDTH = 2, 32, 16


def draw(seed: int = 0) -> torch.Tensor:
    """Entries [2,2K,S,D] of two layers."""
    return torch.randn(2, 2 * HEADS, ENTRIES, WIDTH, generator=torch.Generator().manual_seed(seed))


def back(codec: Slerp, z: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(z), z.shape[-1])


def both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([first, second], dim=1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_parallel_layers_are_exact(t: float) -> None:
    first = draw()[:, :HEADS]
    z = both(first, 3.5 * first)
    close(back(Slerp(t), z), z, torch.float16)


def test_an_orthonormal_pair() -> None:
    z = torch.zeros(1, 2, 4, WIDTH)
    z[:, 0, :, 0] = z[:, 1, :, 1] = 1.0
    shared = Slerp(0.6, among=4).encode(z)["direction.dense"]
    close(shared[0, 0, 0, :2], torch.tensor([math.sin(0.2 * math.pi), math.sin(0.3 * math.pi)]), torch.float16)
    close(shared.float().norm(dim=-1), torch.ones(1, 1, 4), torch.float16)


@pytest.mark.parametrize("inner", [Raw("float16"), Affine(2, 8, "channel"), Affine(3, 32, "token")], ids=str)
def test_lengths_survive_whatever_is_lost(inner: Codec) -> None:
    z = draw()
    got = back(Slerp(0.6, inner=inner), z)
    close(got.norm(dim=-1), z.norm(dim=-1), torch.float16)
    assert error(got, z) > 0.5


def test_the_ends_of_the_arc_are_the_layers() -> None:
    z = draw()
    close(back(Slerp(0.0), z)[:, :HEADS], z[:, :HEADS], torch.float16)
    close(back(Slerp(1.0), z)[:, HEADS:], z[:, HEADS:], torch.float16)


def test_the_least_alike_stay_as_they_are() -> None:
    """Planted: two entries of each half block whose layers disagree."""
    first, noise = draw()[:, :HEADS], draw(1)[:, :HEADS]
    z = both(first, first + 0.1 * noise)
    planted = [3, 9, 17, 30]
    z[:, HEADS:, planted] = -z[:, :HEADS, planted] + 0.1 * noise[:, :, planted]
    codec = Slerp(0.6, retain=2 / 16, among=16)
    parts = codec.encode(z)
    same(parts["apart.index"], torch.tensor([[3, 9], [1, 14]], dtype=torch.uint8).expand(2, HEADS, 2, 2))
    got = codec.decode(parts, WIDTH)
    same(got[:, :, planted], z[:, :, planted])
    others = [at for at in range(ENTRIES) if at not in planted]
    assert 0 < error(got[:, :, others], z[:, :, others]) < 0.5


def test_all_retained_is_exact() -> None:
    codec = Slerp(0.6, retain=1.0, inner=Affine(1, 8, "channel"))
    assert codec.lossless
    same(back(codec, draw()), draw())


def test_a_share_is_rounded_up_and_none_is_none() -> None:
    shares = (0.0, 0.001, 1 / 32, 0.05, 0.5, 1.0)
    assert [Slerp(retain=share, among=32).kept for share in shares] == [0, 1, 1, 2, 16, 32]
    assert "apart.index" not in Slerp().encode(draw())


def test_where_there_is_no_arc_the_longer_one_is_exact() -> None:
    z = draw()
    z[:, HEADS:, 0] = -2 * z[:, :HEADS, 0]  # opposite, the second longer
    z[:, HEADS:, 1] = -0.5 * z[:, :HEADS, 1]
    z[:, :HEADS, 2] = 0  # a zero vector has any direction
    z[:, HEADS:, 3] = 0
    z[:, :, 4] = 0
    got = back(Slerp(0.6), z)
    close(got[:, HEADS:, 0], z[:, HEADS:, 0], torch.float16)
    close(got[:, :HEADS, 1], z[:, :HEADS, 1], torch.float16)
    close(got[:, :, 2:5], z[:, :, 2:5], torch.float16)


def test_nearly_parallel_layers_and_tiny_ones() -> None:
    first = draw()[:, :HEADS]
    z = both(first, first * (1 + 1e-7))
    close(back(Slerp(0.6), z), z, torch.float16)
    assert bool(torch.isfinite(back(Slerp(0.6), 1e-30 * draw())).all())
    assert bool(torch.isfinite(back(Slerp(0.6), 1e4 * draw())).all())


def test_more_retained_less_error() -> None:
    errors = [float((back(Slerp(0.6, retain=share), draw()) - draw()).norm()) for share in (0.0, 0.1, 0.3, 0.7, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 < errors[-2]


def test_blocks_are_independent() -> None:
    """What is written together or apart is the same, so that nothing is ever written again."""
    codec, z = Slerp(0.6, retain=0.25, among=8, inner=Affine(4, 8, "token")), draw()
    whole, cut = codec.encode(z), [codec.encode(part) for part in z.split(8, 2)]
    for name, part in whole.items():
        same(part, torch.cat([each[name] for each in cut], dim=2))


def test_the_bytes_of_a_pair() -> None:
    """A direction and two norms for two layers, and what is retained, with a byte of index an entry and KV head."""
    parts = Slerp(0.6, retain=0.125, among=16).encode(draw().half())
    entries = 2 * HEADS * ENTRIES  # batch, heads, entries of one layer
    kept = entries // 8
    assert sum(part.nbytes for part in parts.values()) == entries * (2 * WIDTH + 2 * 2) + kept * (1 + 2 * 2 * WIDTH)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="a span of two layers"):
        Encoding(Slerp()).check(3, WIDTH)
    with pytest.raises(InputError, match="do not divide the width"):
        Encoding(Slerp(inner=Affine(4, 12, "channel"))).check(4, WIDTH)
    with pytest.raises(InputError, match="mixes KV heads"):
        Encoding(Slerp()).heads([0], 2)
    with pytest.raises(InputError, match="bad arc"):
        Slerp(1.5)
    with pytest.raises(InputError, match="1 to 256"):
        Slerp(among=512)
