"""Segments: attention over the written form is attention over the decoded entries; what enters, leaves and is held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kvtool.cache import coded
from kvtool.cache.coded import Coded
from kvtool.cache.lane import Step
from kvtool.cache.segments import GROWTH, Dense, Segment
from kvtool.encoding.codecs import Affine, Levels, Raw, Ternary
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.encoding.transforms import Gather, Hadamard, Join, Linear, Scale
from kvtool.rotary import Rotary
from kvtool_kernels import ops
from kvtool_kernels.attend.reference import attend
from tests.laws.stores import _pairs as small_pairs
from tests.tolerance import close, same

Pair = tuple[Encoding, Encoding]
G = 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rope(nn.Module):
    """Tables of RoPE for heads of `width` channels."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.width // 2
        angles = positions[..., None] * 100.0 ** (-torch.arange(half) / half)
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotary(width: int) -> Rotary:
    return Rotary(Rope(width), (torch.zeros(1, 1, dtype=torch.int64),), {}, width, interleaved=False)


def basis(heads: int, width: int, rank: int, seed: int = 0) -> Linear:
    down = torch.linalg.qr(draw(heads, width, width, seed=seed))[0][..., :rank].contiguous()
    return Linear(down, down.transpose(1, 2).contiguous(), 0.3 * draw(heads, width, seed=seed + 1))


def wide_pairs(heads: int, width: int) -> dict[str, Pair]:
    """At the sizes of real models: direct ones, then those that kernels cannot read."""
    ranges = 1 + draw(heads, width).abs()
    fixed = Levels(torch.linspace(-2, 2, 8), 1, "channel", "fixed", ranges, 0.1 * ranges)
    normal, signs = torch.tensor([-1.51, -0.453, 0.453, 1.51]), torch.tensor([-1.0, 1.0])
    turn, scale = Hadamard(), Scale(ranges)
    rank, other = basis(heads, width, 20), basis(heads, width, 20, seed=2)
    return {
        "kivi-2": (Encoding(Affine(2, 32, "token")), Encoding(Affine(2, 32, "channel"))),
        "kivi-4": (Encoding(Affine(4, 32, "token")), Encoding(Affine(4, 32, "channel"))),
        "rotated-3": (Encoding(Affine(3, 32, "channel"), (turn,)), Encoding(Affine(3, 32, "token"), (turn,))),
        "scaled": (Encoding(Affine(4, 32, "token"), (scale,)), Encoding(Affine(4, 32, "channel"), (scale,))),
        "low-rank": (Encoding(Raw(), (rank,)), Encoding(Affine(4, 32, "token"), (other,))),
        "low-rank-coded": (Encoding(Affine(4, 4, "channel"), (rank,)), Encoding(Affine(4, 4, "channel"), (other,))),
        "channels": (
            Encoding(Affine(4, 32, "token"), (Gather(torch.arange(3, 40, 2)[None], width),)), Encoding(Raw("float16")),
        ),
        "tables": (Encoding(fixed), Encoding(Levels(normal, 32, "channel", "moments"))),
        "signs": (Encoding(Levels(signs, 32, "token", "absolute")), Encoding(Levels(normal, 32, "token", "minmax"))),
        "only-values": (Encoding(), Encoding(Affine(2, 32, "channel"))),
        "eight-bit-floats": (Encoding(Raw("float8_e5m2")), Encoding(Raw("bfloat16"))),
        "joined": (
            Encoding(Affine(4, 32, "token"), (rank, Join(heads), basis(1, 20 * heads, 30))),
            Encoding(Affine(4, 32, "token"), (Join(heads), basis(1, width * heads, 50))),
        ),
        "ternary": (Encoding(Ternary(32, "token")), Encoding(Affine(2, 32, "channel"))),
        "before-rope": (Encoding(Affine(4, 32, "token"), rotated=False), Encoding(Affine(4, 32, "channel"))),
        "residuals": (
            Encoding(Affine(2, 32, "token"), (), Outliers(1, "token", 32), ErrorBasis(2, 96)),
            Encoding(Affine(2, 32, "channel"), outliers=Outliers(2, "channel")),
        ),
        "joined-apart": (
            Encoding(Affine(4, 32, "token"), (Join(heads),)), Encoding(Affine(4, 32, "channel")),
        ),
    }  # fmt: skip


SMALL, WIDE = small_pairs(2), wide_pairs(3, 64)
INDIRECT = {"ternary", "residuals", "joined-apart", "split", "differences", "polar", "norms"}
CASES = [("small", name) for name in SMALL] + [(which, name) for which in ("64", "128") for name in WIDE]
EACH = pytest.mark.parametrize(("which", "name"), CASES)


def case(which: str, name: str, entries: int | None = None, batch: int = 2) -> tuple[Coded, torch.Tensor, torch.Tensor]:
    """A segment of several appends, and the entries themselves."""
    heads, width, unit = (2, 8, 24) if which == "small" else (3, int(which), 96)
    pair = SMALL[name] if which == "small" else wide_pairs(heads, width)[name]
    held = Coded(*pair, rotary(width))
    entries = 2 * unit if entries is None else entries
    k, v = draw(batch, heads, entries, width, seed=3), draw(batch, heads, entries, width, seed=4)
    for low in range(0, entries, unit):
        held.append(k[:, :, low : low + unit], v[:, :, low : low + unit])
    assert held.length == entries
    return held, k, v


def query(held: Coded, tokens: int = 1, batch: int = 2) -> tuple[torch.Tensor, Step]:
    heads = held.recall()[0].shape[1]
    return draw(batch, G * heads, tokens, held.width[0], seed=5), Step(0, held.width[0] ** -0.5)


def agree(held: Segment, q: torch.Tensor, step: Step) -> None:
    expected = attend(q, *held.recall(), **step.options)
    for actual, wanted in zip(held.attend(q, step), expected, strict=True):
        assert actual.dtype == wanted.dtype
        close(actual, wanted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The entries of each call of the kernels over the written form, and of each over decoded entries, negative."""
    made: list[int] = []

    def spy(run: Callable[..., object], sign: int) -> Callable[..., object]:
        def wrapped(q, k, v, **options):
            made.append(sign * (v.tokens if hasattr(v, "tokens") else v.shape[2]))
            return run(q, k, v, **options)

        return wrapped

    monkeypatch.setattr(coded, "attend_packed", spy(ops.attend_packed, 1))
    monkeypatch.setattr(coded, "attend", spy(ops.attend, -1))
    return made


@pytest.mark.parametrize("tokens", [1, 7])
@EACH
def test_attention_over_the_written_form(which: str, name: str, tokens: int, calls: list[int]) -> None:
    held, _, _ = case(which, name)
    q, step = query(held, tokens)
    agree(held, q, step)
    read = [] if not held.key.rotated else [-held.length if name in INDIRECT else held.length]
    assert calls == read


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", ["kivi-4", "low-rank", "joined", "before-rope"])
def test_with_a_soft_cap(name: str, tokens: int) -> None:
    held, _, _ = case("64", name)
    q, step = query(held, tokens)
    capped = dataclasses.replace(step, softcap=0.7)
    agree(held, 5 * q, capped)
    assert float((held.attend(5 * q, capped)[0] - held.attend(5 * q, step)[0]).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["kivi-4", "only-values", "eight-bit-floats"])
def test_in_half_precision(name: str) -> None:
    held = Coded(*WIDE[name])
    held.append(*(draw(1, 3, 96, 64, seed=seed).bfloat16() for seed in (1, 2)))
    q = draw(1, 9, 1, 64).bfloat16()
    out, lse = held.attend(q, Step(0, 0.125))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    close(out, attend(q.float(), *(x.float() for x in held.recall()), scale=0.125)[0], torch.bfloat16)


@pytest.mark.parametrize("block", [16, 20, 1])
@pytest.mark.parametrize("name", ["ternary", "residuals", "three-bits-rotated"])
def test_block_by_block(name: str, block: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """Where kernels cannot read; in whole blocks of the encoding, however many entries are decoded at a time."""
    monkeypatch.setattr(coded, "BLOCK", block)
    held, _, _ = case("small", name, entries=72)
    q, step = query(held, 2)
    agree(held, q, dataclasses.replace(step, softcap=5.0))
    assert sum(calls) == -72
    assert len(calls) > 3
    assert max(map(abs, calls)) <= max(block, 8)


@EACH
def test_merging_with_dense_entries(which: str, name: str) -> None:
    held, _, _ = case(which, name)
    q, step = query(held, 3)
    recent = Dense()
    k, v = (draw(2, q.shape[1] // G, 63, held.width[0], seed=seed) for seed in (6, 7))
    recent.append(k, v)
    actual = ops.merge(recent.attend(q, step, causal=True), held.attend(q, step))
    past = held.recall()
    whole = attend(q, torch.cat([past[0], k], 2), torch.cat([past[1], v], 2), causal=True, **step.options)
    for one, other in zip(actual, whole, strict=True):
        close(one, other)


@EACH
def test_recall(which: str, name: str) -> None:
    """It is what the encoding decodes, near what was written, and the same in parts."""
    held, k, v = case(which, name)
    keys, values = held.recall()
    same(keys, held.keys())
    assert float((values - v).square().mean()) < float(v.square().mean()) + 1e-4
    if held.key.rotated:
        same(
            keys, torch.cat([held.key.decode(held.key.encode(x), k.shape[3]) for x in k.split(held.length // 2, 2)], 2)
        )
    border = held.length // 2
    for low, high in ((0, border), (border, held.length), (border, held.length - 3)):
        part = held.recall(low, high)
        close(part[0], keys[:, :, low:high])
        close(part[1], values[:, :, low:high])


@pytest.mark.parametrize("unit", [4, 8, 24])
@pytest.mark.parametrize("name", SMALL)
def test_gathering_units(name: str, unit: int) -> None:
    held, _, _ = case("small", name, entries=72)
    units = torch.stack([torch.randperm(72 // unit)[:2] for _ in range(4)]).reshape(2, 2, 2)
    whole = held.recall()
    index = (units[..., None] * unit + torch.arange(unit)).flatten(2)[..., None].expand(-1, -1, -1, 8)
    for side, expected in zip(held.gather(units, unit), whole, strict=True):
        close(side, expected.gather(2, index))


@pytest.mark.parametrize("ragged", [False, True])
def test_positions_of_keys_before_rope(ragged: bool) -> None:
    """Keys are written as at position 0 and come back where they were, in order and gathered."""
    shape = (2, 2, 72) if ragged else (72,)
    positions = torch.randint(900, shape, generator=torch.Generator().manual_seed(0)).sort(-1).values
    held, turner = Coded(Encoding(Raw(), rotated=False), Encoding(), rotary(8)), rotary(8)
    held.positions = lambda low, high: positions[..., low:high]
    bare = draw(2, 2, 1, 8).expand(-1, -1, 72, -1)
    k = turner.rotate(bare, turner.table(positions))
    held.append(k[:, :, :24], k[:, :, :24])
    held.append(k[:, :, 24:], k[:, :, 24:])
    close(held.parts["key"]["dense"], bare)
    close(held.keys(), k)
    close(held.keys(24, 50), k[:, :, 24:50])
    units = torch.tensor([[[4, 0], [1, 8]], [[2, 3], [8, 7]]])
    close(held.gather(units, 8)[0], held.gather(units, 8)[1])


@pytest.mark.parametrize("name", ["four-bits", "before-rope", "residuals", "joined-direct"])
def test_bytes_fetched_from_slow_memory(name: str) -> None:
    fast, k, v = case("small", name, entries=48)
    held = Coded(fast.key, fast.value, fast.rotary, slow=True)
    held.append(k[:, :, :24], v[:, :, :24])
    held.append(k[:, :, 24:], v[:, :, 24:])
    q, step = query(fast, 2)
    for slow, quick in zip(held.attend(q, step), fast.attend(q, step), strict=True):
        close(slow, quick)
    assert held.moved == held.read_bytes()
    assert fast.moved == 0
    held.moved = 0
    held.gather(torch.tensor([0, 2]).expand(2, 2, 2), 8)
    assert held.moved == held.read_bytes() * held.key.joined * 16 / 48  # for each of joined heads, its own units
    held.moved = 0
    held.keys(0, 24)
    assert held.moved == held.key_bytes() / 2


@EACH
def test_bytes_of_the_written_form(which: str, name: str) -> None:
    held, k, v = case(which, name)
    parts = [encoding.encode(x) for encoding, x in ((held.key, k), (held.value, v))]
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    assert (held.key_bytes(), held.read_bytes()) == (sizes[0], sum(sizes))
    assert all(buffer.untyped_storage().nbytes() == buffer.nbytes for buffer in held.buffers())


@pytest.mark.parametrize(("name", "bits"), [("kivi-2", 3.0), ("kivi-4", 5.0), ("ternary", (2.25 + 3.0) / 2)])
def test_bits_an_element(name: str, bits: float) -> None:
    held, k, v = case("128", name)
    assert held.read_bytes() * 8 == bits * (k.numel() + v.numel())


def test_coded_entries_are_not_the_callers() -> None:
    """What is appended may be overwritten afterwards, or be a view into more."""
    held = Coded(Encoding(), Encoding())
    k = draw(1, 2, 80, 8)
    held.append(k[:, :, :3], k[:, :, 3:6])
    kept = [x.clone() for x in held.recall()]
    k.fill_(float("nan"))
    for now, then in zip(held.recall(), kept, strict=True):
        same(now, then)


@EACH
def test_other_rows(which: str, name: str) -> None:
    held, _, _ = case(which, name)
    before = held.recall()
    held.reorder(torch.tensor([1, 1, 0]))
    for now, then in zip(held.recall(), before, strict=True):
        close(now, then[[1, 1, 0]])


def test_nothing_coded_is_neutral() -> None:
    q = draw(1, 6, 2, 8)
    out, lse = Coded(*SMALL["four-bits"]).attend(q, Step(0, 1.0))
    same(out, torch.zeros_like(q))
    same(lse, torch.full((1, 6, 2), float("-inf")))
    assert Coded(*SMALL["four-bits"]).read_bytes() == Coded(*SMALL["four-bits"]).key_bytes() == 0


@pytest.mark.parametrize("name", ["three-bits-rotated", "tables", "channels", "eight-bit-floats"])
def test_one_coded_entry(name: str) -> None:
    held, _, _ = case("small", name, entries=1)
    q, step = query(held)
    agree(held, q, step)


def dense(entries: int = 100) -> tuple[Dense, torch.Tensor, torch.Tensor]:
    """Entries, with NaN in the room to grow."""
    held, k, v = Dense(), draw(2, 2, entries, 8), draw(2, 2, entries, 6, seed=1)
    for low in range(0, entries, 37):
        held.append(k[:, :, low : low + 37], v[:, :, low : low + 37])
    for buffer in held.buffers():
        buffer[:, :, entries:] = float("nan")
    return held, k, v


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("entries", [5, 63, 100, 128])
def test_dense_attention(entries: int, causal: bool, tokens: int) -> None:
    held, k, v = dense(entries)
    q, step = draw(2, 2 * G, tokens, 8, seed=2), Step(0, 0.3, softcap=4.0)
    expected = attend(q, k, v, causal=causal, **step.options)
    for actual, wanted in zip(held.attend(q, step, causal=causal), expected, strict=True):
        close(actual, wanted)


def test_dense_memory_grows_in_steps() -> None:
    held = Dense()
    assert held.read_bytes() == held.key_bytes() == 0
    for count, room in ((63, 1), (1, 1), (1, 2), (2 * GROWTH, 4)):
        held.append(draw(2, 3, count, 8), draw(2, 3, count, 6))
        assert [buffer.nbytes for buffer in held.buffers()] == [2 * 3 * room * GROWTH * n * 4 for n in (8, 6)]
        assert held.key_bytes() == 2 * 3 * held.length * 8 * 4
        assert held.read_bytes() == 2 * 3 * held.length * 14 * 4


@pytest.mark.parametrize("count", [1, 36, 64, 99, 100])
def test_the_oldest_leave(count: int) -> None:
    held, k, v = dense()
    same(torch.cat(held.pop(count), 3), torch.cat([k, v], 3)[:, :, :count])
    assert held.length == 100 - count
    assert sum(b.nbytes for b in held.buffers()) == -(-held.length // GROWTH) * GROWTH * 2 * 2 * 14 * 4
    held.append(k[:, :, :2], v[:, :, :2])
    same(held.keys(), torch.cat([k[:, :, count:], k[:, :, :2]], 2))


def test_what_is_taken_stays() -> None:
    held, k, v = dense()
    index = torch.stack([torch.randperm(100)[:7].sort().values for _ in range(4)]).reshape(2, 2, 7)
    held.take(index)
    k, v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v))
    for actual, wanted in zip(held.recall(), (k, v), strict=True):
        same(actual, wanted)
    assert sum(b.nbytes for b in held.buffers()) == 2 * 2 * 7 * 14 * 4
    held.append(k[:, :, :1], v[:, :, :1])
    same(held.keys(), torch.cat([k, k[:, :, :1]], 2))


def test_counts_stay_with_their_entries() -> None:
    """An entry that stands for n weighs as n copies; those that come later stand for themselves."""
    held, k, v = dense()
    counts = torch.randint(1, 4, (2, 2, 100), generator=torch.Generator().manual_seed(0)).float()
    held.become(k, v, counts, count=True)
    held.pop(30)
    held.append(k[:, :, :5], v[:, :, :5])
    same(held.counts(), torch.cat([counts[:, :, 30:], torch.ones(2, 2, 5)], 2))
    q, step = draw(2, 2 * G, 5, 8, seed=2), Step(0, 0.3)
    bias = held.counts().log()[:, :, None].repeat_interleave(G, 1)
    for causal in (False, True):
        expected = attend(q, *held.recall(), bias=bias, causal=causal, **step.options)
        for actual, wanted in zip(held.attend(q, step, causal=causal), expected, strict=True):
            close(actual, wanted)


def test_dense_units_and_rows() -> None:
    held, k, v = dense(96)
    units = torch.tensor([[[3, 0], [1, 11]], [[2, 5], [11, 7]]])
    index = (units[..., None] * 8 + torch.arange(8)).flatten(2)[..., None]
    for actual, whole in zip(held.gather(units, 8), (k, v), strict=True):
        same(actual, whole.gather(2, index.expand(-1, -1, -1, whole.shape[3])))
    held.reorder(torch.tensor([1, 0, 1]))
    same(held.keys(), k[[1, 0, 1]])


def test_slow_dense_entries_are_counted_when_fetched() -> None:
    held = Dense(slow=True)
    held.append(draw(2, 2, 96, 8), draw(2, 2, 96, 6))
    held.attend(draw(2, 2, 1, 8), Step(0, 1.0))
    assert held.moved == held.read_bytes()
    held.gather(torch.zeros(2, 2, 1, dtype=torch.int64), 8)
    assert held.moved == held.read_bytes() * (1 + 8 / 96)
