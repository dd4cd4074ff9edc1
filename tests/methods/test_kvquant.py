"""KVQuant, card B2: fitted levels, ranges before RoPE, what the loss feels, outliers, Q-Norm."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.encoding import codebook
from kvtool.encoding.codecs import Levels
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.methods.kvquant import Options, counted, fitted, unfitted
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.tolerance import close, same

HEADS, TOKENS, WIDTH = 3, 256, 8
SCALE = 10.0 ** torch.linspace(-1, 1, HEADS * WIDTH).reshape(HEADS, WIDTH)
ZERO = torch.linspace(-2, 2, HEADS * WIDTH).reshape(HEADS, WIDTH)


def made(model: Model, **settings: object) -> Plan:
    return calibrate("kvquant", {"samples": 1, "tokens": 60, **settings}, model=models.with_tokenizer(model))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codec(side: Encoding) -> Levels:
    assert isinstance(side.codec, Levels)
    return side.codec


def fit(options: Options, x: torch.Tensor, gradient: torch.Tensor | None = None) -> tuple[Encoding, Encoding]:
    """Both sides fitted to the same numbers x [K,T,D]."""
    ranges = (x.amax(1) - x.amin(1)) / 2, (x.amax(1) + x.amin(1)) / 2
    slope = torch.ones_like(x) if gradient is None else gradient
    sides = unfitted(options, WIDTH, *ranges)
    first, second = (fitted(side, counted(side, x, slope, options.weights), options) for side in sides)
    return first, second


def error(side: Encoding, x: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    change = side.decode(side.encode(x[None]), WIDTH)[0] - x
    return float((change.square() * (1.0 if weights is None else weights)).sum())


@pytest.mark.parametrize("across", ["layer", "head"])
def test_affine_images_of_common_levels_are_exact(across: str) -> None:
    """Check: columns that are affine images of 2^b common levels lose nothing."""
    table = torch.tensor([-1.0, -0.3, 0.1, 1.0])
    pick = torch.randint(0, 4, (HEADS, TOKENS, WIDTH), generator=torch.Generator().manual_seed(0))
    pick[:, 0], pick[:, 1] = 0, 3  # so that every column's range is known
    x = ZERO[:, None] + SCALE[:, None] * table[pick]
    key, _ = fit(Options(bits=2, outliers=0, qnorm=0, across=across), x)  # type: ignore[arg-type]
    close(key.decode(key.encode(x[None]), WIDTH)[0] / SCALE[:, None], x / SCALE[:, None])


def test_fitted_levels_err_less_than_even_ones() -> None:
    x = ZERO[:, None] + SCALE[:, None] * draw(HEADS, TOKENS, WIDTH)
    options = Options(bits=3, outliers=0, weights="scaled")
    even = unfitted(options, WIDTH, (x.amax(1) - x.amin(1)) / 2, (x.amax(1) + x.amin(1)) / 2)
    for before, after in zip(even, fit(options, x), strict=True):
        assert error(after, x) < 0.9 * error(before, x)


def test_levels_go_where_the_loss_feels() -> None:
    """A planted slope: only numbers around 0.8 matter, so they get the levels."""
    x = draw(HEADS, TOKENS, WIDTH).clamp(-1, 1)
    felt = (x - 0.8).abs() < 0.15
    key, _ = fit(Options(bits=2, outliers=0, qnorm=0), x, felt.float() + 1e-3)
    plain, _ = fit(Options(bits=2, outliers=0, qnorm=0, weights="none"), x)
    assert bool(((codec(key).levels - 0.8).abs() < 0.15).all())
    assert int(((codec(plain).levels - 0.8).abs() < 0.15).sum()) == 1
    assert error(key, x, felt.float()) < 0.3 * error(plain, x, felt.float())


def test_scaled_weights_count_wide_channels_more() -> None:
    """The harm of an error in A is F·ρ²: with it the total error is smaller, where channels differ in shape."""
    x = draw(HEADS, TOKENS, WIDTH)
    x[0] = x[0].sign() * (1 + 0.05 * x[0].abs())  # two clusters a channel, and wide ranges
    x[0] *= 100
    scaled, flat = (fit(Options(bits=2, outliers=0, qnorm=0, weights=w), x)[0] for w in ("scaled", "fisher"))
    assert error(scaled, x) < 0.9 * error(flat, x)


def test_outliers_are_exact_and_leave_the_ranges_alone() -> None:
    x = draw(HEADS, TOKENS, WIDTH)
    x[1, ::7, 2] = 50.0
    key, value = fit(Options(bits=3, outliers=0.05), x)
    for side in (key, value):
        back = side.decode(side.encode(x[None]), WIDTH)[0]
        same(back[1, ::7, 2], torch.full_like(back[1, ::7, 2], 50.0))
    _, without = fit(Options(bits=3, outliers=0.0), x)
    assert error(value, x) < 0.1 * error(without, x)


def test_qnorm_restores_the_moments() -> None:
    x = draw(HEADS, 4096, WIDTH)
    x[:, 0], x[:, 1] = 4.0, -4.0  # one range for all channels
    key, _ = fit(Options(bits=2, outliers=0, qnorm=2, weights="none"), x)
    bare, _ = fit(Options(bits=2, outliers=0, qnorm=0, weights="none"), x)
    assert codec(bare).restored is None
    same(codec(bare).levels, codec(key).levels)
    same(key.encode(x[None])["codes"], bare.encode(x[None])["codes"])  # chosen by the same table
    back, snapped = (side.decode(side.encode(x[None]), WIDTH)[0] for side in (key, bare))
    close(torch.stack([back.mean(), back.std()]), torch.stack([x.mean(), x.std()]), torch.float16)
    assert float(snapped.std()) < 0.97 * float(x.std())
    assert codec(fit(Options(bits=3, outliers=0), x)[0]).restored is None  # published for 2 bits


def test_sinks_are_not_fitted_to() -> None:
    """The first four tokens of the text hold some channel's extreme: without them ranges are narrower, none wider."""
    network = models.shallow("llama")
    ranges = []
    for sink in (0, 4):
        store = made(network, sink=sink, outliers=0.0).store
        assert store is not None
        scale = codec(store.keys[0]).scale
        assert scale is not None
        ranges.append(scale)
    assert bool((ranges[1] <= ranges[0]).all())
    assert float(ranges[1].sum()) < float(ranges[0].sum())


def test_a_plan_holds_all(llama: Model) -> None:
    g, plan = llama.geometry, made(llama, bits=2, outliers=0.2)
    store = plan.store
    assert store is not None
    same(store.index, torch.arange(g.layers, dtype=torch.int32)[:, None].expand(-1, g.kv_heads).contiguous())
    channels = g.kv_heads * g.head_dim
    for key, value in zip(store.keys, store.values, strict=True):
        assert not key.rotated
        assert value.rotated
        assert (codec(key).group, codec(value).group) == (1, channels)
        assert codec(key).restored is not None
        assert key.outliers is not None
        assert key.outliers.count == 4  # .2 of 16 channels, rounded up
        for side in (key, value):
            table = codec(side).levels
            assert bool((table.diff() > 0).all())
    assert codec(store.keys[0]).levels.tolist() != codec(store.keys[1]).levels.tolist()


def test_per_head_it_composes_with_heads_that_keep_entries_of_their_own(llama: Model) -> None:
    plan = made(llama, across="head")
    assert plan.store is not None
    assert not any(side.mixes for side in (*plan.store.keys, *plan.store.values))
    half = plan.store.keys[0].heads([1], of=2)
    assert codec(half).scale is not None
    same(codec(half).scale, codec(plan.store.keys[0]).scale[1:])  # type: ignore[index, arg-type]


def test_the_same_texts_give_the_same_levels(llama: Model) -> None:
    first, second = (made(llama).store for _ in range(2))
    assert first is not None
    assert second is not None
    same(codec(first.keys[1]).levels, codec(second.keys[1]).levels)


def test_histograms_leave_out_what_is_stored_apart() -> None:
    x = draw(HEADS, TOKENS, WIDTH)
    options = Options(bits=2, outliers=2 / (HEADS * WIDTH))
    for side in unfitted(options, WIDTH, torch.full((HEADS, WIDTH), 9.0), torch.zeros(HEADS, WIDTH)):
        total = counted(side, x, torch.ones_like(x), "none")[1, 0].sum()
        assert int(total) == TOKENS * (HEADS * WIDTH - 2)
    assert codebook.BINS % 2 == 0  # no bin straddles 0


@pytest.mark.parametrize("across", ["layer", "head"])
def test_what_it_is_compared_with(across: str, llama: Model) -> None:
    """Even levels, ranges of tokens, keys after RoPE: one thing changes, the outliers and the rest stay."""
    usual, even, token, after = (
        made(llama, across=across, **chosen).store
        for chosen in ({}, {"levels": "even"}, {"keys": "token"}, {"rope": "after"})
    )
    assert usual is not None and even is not None and token is not None and after is not None  # noqa: PT018
    same(codec(even.keys[0]).levels, torch.linspace(-1, 1, 8))
    same(codec(even.keys[0]).scale, codec(usual.keys[0]).scale)  # type: ignore[arg-type]
    assert codec(token.keys[0]).ranges == "minmax"
    assert not token.keys[0].rotated
    assert after.keys[0].rotated
    for store in (even, token, after):
        assert store.keys[0].outliers is not None
        assert usual.keys[0].outliers is not None
        assert store.keys[0].outliers.count == usual.keys[0].outliers.count
        same(codec(store.values[0]).levels, codec((even if store is even else usual).values[0]).levels)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bytes_are_the_formula(bits: int) -> None:
    """Eight heads of 128 channels: 11 outliers of 32 bits in 1,024 numbers, and a range of values."""
    x = draw(1, 8, 5, 128)
    sides = unfitted(Options(bits=bits), 128, torch.ones(8, 128), torch.zeros(8, 128))
    for side, extra in zip(sides, (0, 32), strict=True):
        held = sum(part.nbytes for part in side.encode(x).values())
        assert 8 * held == 5 * (1024 * bits + 11 * 32 + extra)


def test_a_whole_number_of_outliers_is_not_rounded_up() -> None:
    key, value = unfitted(Options(outliers=0.01), 100, torch.ones(7, 100), torch.zeros(7, 100))
    assert key.outliers is not None
    assert value.outliers is not None
    assert key.outliers.count == value.outliers.count == 7


def test_refusals() -> None:
    with pytest.raises(InputError, match="outliers"):
        Options(outliers=1.5)
    with pytest.raises(InputError, match="qnorm"):
        dataclasses.replace(Options(), qnorm=-1)
    with pytest.raises(InputError, match="more than the 4 sinks"):
        Options(tokens=4)
