"""Coded entries: attention over the written form is attention over the decoded entries; what is held and fetched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.segments import Dense
from kvtool.cache.store import coded
from kvtool.cache.store.coded import Coded
from kvtool.encoding.codecs import Affine, Levels, Raw, Ternary
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.encoding.transforms import Gather, Hadamard, Join, Scale
from kvtool_kernels import ops
from kvtool_kernels.attend.reference import attend
from tests.cache.segments import G, agree, basis, draw, rotary
from tests.laws.stores import _pairs as small_pairs
from tests.tolerance import close, same

Pair = tuple[Encoding, Encoding]


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


SMALL = {name: pair for name, pair in small_pairs(2).items() if not pair[1].joint}  # they have a file of their own
WIDE = wide_pairs(3, 64)
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
