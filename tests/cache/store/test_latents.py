"""Keys stored before RoPE are rebuilt as they are read: that is attention over what their segment recalls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.store import coded, latents
from kvtool.cache.store.coded import Coded
from kvtool.cache.store.pool import Member, Pool
from kvtool.encoding.codecs import Affine, Levels, Raw, Ternary
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.encoding.transforms import Gather, Hadamard, Join, Scale
from kvtool.rotary import NONE, Rotary
from kvtool_kernels import ops
from kvtool_kernels.attend.reference import attend
from tests import models
from tests.cache.segments import Rope, basis, draw, rotary
from tests.tolerance import close, same

HEADS, WIDTH, ENTRIES = 4, 16, 160
RANGES = 1 + draw(1, 4 * WIDTH).abs()
FIXED = Levels(torch.linspace(-2, 2, 8), 1, "channel", "fixed", RANGES, 0.1 * RANGES)
ORDER = Gather(torch.stack([torch.randperm(WIDTH)[:10] for _ in range(HEADS)]), WIDTH)
KEYS = {
    "as they are": Encoding(rotated=False),
    "coded": Encoding(Affine(4, 32, "token"), rotated=False),
    "low rank": Encoding(transforms=(basis(HEADS, WIDTH, 5),), rotated=False),
    "one basis": Encoding(transforms=(basis(1, WIDTH, 5),), rotated=False),
    "coded latents": Encoding(Affine(4, 2, "channel"), (basis(HEADS, WIDTH, 6),), rotated=False),
    "joined": Encoding(transforms=(Join(2), basis(2, 2 * WIDTH, 12)), rotated=False),
    "joined, coded": Encoding(Affine(3, 4, "channel"), (Join(4), basis(1, 4 * WIDTH, 20)), rotated=False),
    "twice": Encoding(transforms=(basis(HEADS, WIDTH, 8), Join(2), basis(2, 16, 7)), rotated=False),
    "other maps": Encoding(Raw("float16"), (Scale(RANGES.view(4, WIDTH)), Hadamard()), rotated=False),
    "channels": Encoding(Affine(4, 2, "channel"), (ORDER,), rotated=False),
    "kvquant": Encoding(FIXED, (Join(4),), Outliers(2, "channel", scale=RANGES, zero=0.1 * RANGES), rotated=False),
    "ternary": Encoding(Ternary(32, "token"), rotated=False),
    "everything": Encoding(
        Affine(2, 8, "token"), (Hadamard(),), Outliers(1, "token", 16), ErrorBasis(2, 32), rotated=False
    ),
}
VALUES = {
    "as they are": Encoding(),
    "coded": Encoding(Affine(4, 16, "channel")),
    "joined": Encoding(Affine(4, 32, "token"), (Join(4), basis(1, 4 * WIDTH, 20, seed=2))),
    "side by side": Encoding(Affine(4, 64, "channel"), (Join(4),), Outliers(2, "channel")),
    "turned": Encoding(Ternary(32, "token"), (Hadamard(),)),
}


def filled(key: Encoding, value: Encoding, turner: Rotary | None = None) -> Coded:
    """In two appends, not from position 0 on."""
    held = Coded(key, value, turner or rotary(WIDTH))
    held.positions = lambda low, high: torch.arange(low, high) + 7
    k, v = draw(2, HEADS, ENTRIES, WIDTH, seed=3), draw(2, HEADS, ENTRIES, WIDTH, seed=4)
    for low, high in ((0, 96), (96, ENTRIES)):
        held.append(k[:, :, low:high], v[:, :, low:high])
    return held


def agree(held: Coded, tokens: int = 1, group: int = 3, softcap: float | None = None) -> None:
    q, step = 2 * draw(2, group * HEADS, tokens, WIDTH, seed=5), Step(0, WIDTH**-0.5, softcap)
    expected = attend(q, *held.recall(), **step.options)
    for actual, wanted in zip(held.attend(q, step), expected, strict=True):
        assert actual.dtype == wanted.dtype
        close(actual, wanted)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The entries of each call of the kernel; nothing is attended to in any other way."""
    calls: list[int] = []

    def spy(q, z, *rest, **options):
        calls.append(z.shape[2] if isinstance(z, torch.Tensor) else z.tokens)
        return ops.attend_latent(q, z, *rest, **options)

    monkeypatch.setattr(latents, "attend_latent", spy)
    for name in ("attend", "attend_packed"):
        monkeypatch.delattr(coded, name)
    return calls


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", KEYS)
def test_it_is_attention_over_decoded_entries(key: str, value: str, asked: list[int]) -> None:
    agree(filled(KEYS[key], VALUES[value]))
    assert asked == [ENTRIES]


@pytest.mark.parametrize("name", ["ternary", "everything"])
def test_what_kernels_cannot_read_comes_in_blocks(name: str, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "BLOCK", 64)
    agree(filled(KEYS[name], VALUES["joined"]), tokens=2, softcap=1.5)
    assert asked == [64, 64, 32]


@pytest.mark.parametrize("tokens", [1, 5])
def test_many_heads_a_group_and_soft_caps(tokens: int, asked: list[int]) -> None:
    agree(filled(KEYS["joined, coded"], VALUES["joined"]), tokens, group=9, softcap=0.7)
    assert asked


def test_a_long_chunk_is_worth_decoding_for() -> None:
    held = filled(KEYS["low rank"], VALUES["coded"])
    q = draw(2, 3 * HEADS, latents.ROWS, WIDTH)
    assert not latents.apply(held, q)
    assert latents.apply(held, q[:, :, : latents.ROWS // 3])
    agree(held, latents.ROWS)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [0, 8, WIDTH])
def test_partly_rotated_heads_in_either_order(width: int, interleaved: bool, asked: list[int]) -> None:
    class Pairs(Rope):
        def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(1.3 * part.chunk(2, -1)[0].repeat_interleave(2, -1) for part in super().forward(positions))

    module = (Pairs if interleaved else Rope)(width)
    turner = Rotary(module, (torch.zeros(1, 1, dtype=torch.int64),), {}, width, interleaved) if width else NONE
    for name in ("joined", "coded", "twice"):
        agree(filled(KEYS[name], VALUES["coded"], turner))
    assert len(asked) == 3


def test_entries_in_no_order(asked: list[int]) -> None:
    """Each head and row has positions of its own, as a selection leaves them."""
    places = torch.stack([torch.randperm(500)[:ENTRIES] for _ in range(2 * HEADS)]).view(2, HEADS, ENTRIES)
    for name in ("joined", "coded", "everything"):
        held = Coded(KEYS[name], VALUES["coded"], rotary(WIDTH))
        held.positions = lambda low, high: places[..., low:high]
        held.append(draw(2, HEADS, ENTRIES, WIDTH, seed=3), draw(2, HEADS, ENTRIES, WIDTH, seed=4))
        agree(held)
    assert len(asked) == 3


def test_in_half_precision() -> None:
    held = Coded(KEYS["joined"], VALUES["joined"], rotary(WIDTH))
    held.append(*(draw(1, HEADS, 96, WIDTH, seed=seed).bfloat16() for seed in (1, 2)))
    q = draw(1, 3 * HEADS, 1, WIDTH).bfloat16()
    out, lse = held.attend(q, Step(0, 0.25))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    close(out, attend(q.float(), *(x.float() for x in held.recall()), scale=0.25)[0], torch.bfloat16)


def test_a_layer_rebuilds_its_own_part_of_a_shared_latent(asked: list[int]) -> None:
    key = Encoding(transforms=(Join(3 * HEADS), basis(1, 3 * HEADS * WIDTH, 30)), rotated=False)
    pool = Pool(
        Coded(key, Encoding(transforms=(Join(3 * HEADS), basis(1, 3 * HEADS * WIDTH, 25))), rotary(WIDTH)), 3, HEADS
    )
    members = [Member(pool, number) for number in range(3)]
    for number, member in enumerate(members):
        member.append(*(draw(2, HEADS, ENTRIES, WIDTH, seed=10 * number + seed) for seed in (1, 2)))
    q, step = draw(2, 3 * HEADS, 2, WIDTH, seed=5), Step(0, 0.25)
    for member in members:
        expected = attend(q, *member.recall(), **step.options)
        for actual, wanted in zip(member.attend(q, step), expected, strict=True):
            close(actual, wanted)
    assert asked == [ENTRIES] * 3


def test_an_encoding_that_changes_is_followed() -> None:
    """As one does that fits itself to the first entries."""
    held = filled(KEYS["twice"], VALUES["joined"])
    before = held.recall()[0]
    held.key = dataclasses.replace(held.key, transforms=(basis(HEADS, WIDTH, 8, seed=9), *held.key.transforms[1:]))
    assert not torch.allclose(held.recall()[0], before)
    agree(held)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "cohere", "rope-yarn", "rope-llama3", "gpt-oss"])
def test_tables_of_real_models(name: str) -> None:
    """Once a pair, they are the model's own: a key that turns by them is the key that the model makes."""
    turner = models.shared(name).rotary(0)
    whole = turner.table(torch.arange(40))
    assert whole is not None
    for part, full in zip(turner.rows(40, torch.device("cpu")), whole, strict=True):
        assert part.shape == (40, turner.width // 2)
        same(part.repeat_interleave(2, -1) if turner.interleaved else torch.cat([part, part], -1), full)


def test_tables_are_shared_until_they_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    table: Callable[..., object] = Rotary.table
    monkeypatch.setattr(Rotary, "table", lambda self, positions: made.append(len(positions)) or table(self, positions))
    turner = dataclasses.replace(rotary(WIDTH), tables={})
    for count in (9, 5, 9, 12):
        assert len(turner.rows(count, torch.device("cpu"))[0]) == count
    assert made == [9, 12]
    assert turner.tables is not None
    turner.tables.clear()
    turner.rows(3, torch.device("cpu"))
    assert made == [9, 12, 3]


@pytest.mark.parametrize("name", KEYS)
def test_matrices_are_those_of_the_transforms(name: str) -> None:
    encoding = KEYS[name]
    matrix, offset = encoding.back(HEADS, WIDTH)
    x = z = draw(2, HEADS // encoding.joined, 9, encoding.written(WIDTH))
    for step in reversed(encoding.transforms):
        x = step.inverse(x)
    made = z if matrix is None else z @ matrix
    made = made if offset is None else made + offset[:, None]
    close(Join(encoding.joined).inverse(made), x)


def test_a_basis_is_not_copied() -> None:
    up = basis(1, 4 * WIDTH, 20)
    assert Encoding(transforms=(Join(4), up)).back(HEADS, WIDTH)[0] is up.up
    assert Encoding(transforms=(Join(4),)).back(HEADS, WIDTH) == (None, None)
