"""RotateKV, card B5: rotation over joined heads before RoPE, an order of channels, clipped ranges, raw first tokens."""

from __future__ import annotations

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Gather, Hadamard, Join
from kvtool.errors import InputError
from kvtool.methods._base import Context
from kvtool.methods.rotatekv import Options
from kvtool.methods.rotatekv import calibrate as decide
from kvtool.model import Geometry, Model
from kvtool.plan import Plan
from kvtool.slots import Store
from kvtool.trace import Trace, statistic
from tests.laws.methods import observed
from tests.tolerance import close, same


def made(model: Model, **settings: object) -> Plan:
    return calibrate("rotatekv", settings, model=model, trace=observed(model, ("channels",)))


def stored(plan: Plan) -> Store:
    assert plan.store is not None
    return plan.store


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(kv_heads: int, width: int, means: torch.Tensor, **settings: object) -> Encoding:
    """The key's encoding where keys before RoPE have these means [K·D]."""
    geometry = Geometry("llama", 1, kv_heads, kv_heads, width, 8, 8, (None,), "")
    seen = statistic("channels")(None, geometry)
    seen["k_pre.sum"][0], seen["tokens"] = 10.0 * means.reshape(kv_heads, width), torch.tensor([10.0])
    context = Context(geometry, trace=Trace({}, statistics={"channels": seen}))
    store = decide(context, Options(**settings)).store  # type: ignore[arg-type]
    assert store is not None
    return store.keys[0]


def through(encoding: Encoding, x: torch.Tensor) -> torch.Tensor:
    for step in encoding.transforms:
        x = step.forward(x)
    return x


@pytest.mark.parametrize(("kv_heads", "together"), [(1, 1), (2, 2), (3, 1), (6, 2), (8, 4), (12, 4)])
def test_heads_are_joined_in_powers_of_two(kv_heads: int, together: int) -> None:
    """Every `together` heads have one transform of together·D channels; all of a layer end up side by side."""
    key = planted(kv_heads, 8, torch.zeros(kv_heads * 8), order="none")
    x = torch.zeros(1, kv_heads, 1, 8)
    x[0, 0, 0, 3] = 1.0
    z = through(key, x)[0, 0, 0]
    assert z.shape == (kv_heads * 8,)
    assert int((z != 0).sum()) == together * 8
    close(z[: together * 8].abs(), torch.full((together * 8,), (together * 8) ** -0.5))


def test_channels_come_in_the_order_of_their_rotated_means() -> None:
    means = draw(4 * 16)
    key = planted(4, 16, means)
    rotated = through(key, means.reshape(1, 4, 1, 16))
    assert bool((rotated.diff(dim=-1) >= 0).all())
    first = torch.linalg.vector_norm(means)
    close(torch.linalg.vector_norm(rotated), first)


def test_the_order_makes_groups_narrow() -> None:
    """Planted offsets in two sizes, dealt to channels at random: in order, a group has one size of them."""
    offset = torch.where(draw(64).argsort() % 2 == 0, 30.0, -30.0)  # 32 of each
    rotated = Hadamard().inverse(offset[None, None, None])[0, 0, 0]  # so that rotated keys have these means
    x = (rotated + 0.5 * draw(400, 64, seed=1)).reshape(1, 400, 4, 16).transpose(1, 2)
    errors = []
    for order in ("mean", "none"):
        key = planted(4, 16, rotated, order=order, group=8, bits=3, clip=1.0)
        errors.append(float((key.decode(key.encode(x), 16) - x).square().mean()))
    assert errors[0] < 0.05 * errors[1]


def test_rotation_shares_an_outlier_out() -> None:
    x = draw(1, 4, 200, 16)
    x[:, 1, :, 5] += 40.0 * x[:, 1, :, 5].sign()
    key = planted(4, 16, torch.zeros(64), group=64, bits=3)
    plain = Encoding(Affine(3, 64, "channel"), (Join(4),))
    quiet = torch.ones(4, 16, dtype=torch.bool)
    quiet[1, 5] = False
    errors = [((side.decode(side.encode(x), 16) - x).square().mean((0, 2)))[quiet].mean() for side in (key, plain)]
    assert float(errors[0]) < 0.5 * float(errors[1])


def test_without_rotation_channels_are_only_put_in_order() -> None:
    means = draw(2 * 8)
    key = planted(2, 8, means, heads=0)
    same(through(key, means.reshape(1, 2, 1, 8)).flatten(), means.sort().values)


@pytest.mark.parametrize(("bits", "clip"), [(1, 0.8), (2, 0.8), (3, 1.0), (4, 1.0)])
def test_ranges_are_clipped_at_few_bits(bits: int, clip: float, llama: Model) -> None:
    for side in (*stored(made(llama, bits=bits)).keys, *stored(made(llama, bits=bits)).values):
        assert isinstance(side.codec, Affine)
        assert side.codec.clip == clip
    own = stored(made(llama, bits=bits, clip=0.5)).keys[0].codec
    assert isinstance(own, Affine)
    assert own.clip == 0.5


@pytest.mark.parametrize(("group", "expected"), [(128, 16), (12, 8), (8, 8), (1, 1)])
def test_groups_divide_the_layer(group: int, expected: int, llama: Model) -> None:
    codec = stored(made(llama, group=group)).values[0].codec
    assert isinstance(codec, Affine)
    assert codec.group == expected


def test_constant_groups_are_exact(llama: Model) -> None:
    """A value that its rotation makes the same in all channels comes back as it is."""
    value = stored(made(llama, bits=2, clip=1.0)).values[0]
    x = torch.zeros(1, 2, 5, 8)
    x[..., 0] = 3.0
    close(value.decode(value.encode(x), 8), x, torch.float16)


def test_order_and_transform_undo_themselves(llama: Model) -> None:
    for layer, key in enumerate(stored(made(llama)).keys):
        assert not key.rotated
        gather = key.transforms[-1]
        assert isinstance(gather, Gather)
        same(gather.index.sort().values, torch.arange(16)[None])
        x = draw(1, 2, 7, 8, seed=layer)
        z = through(key, x)
        for step in reversed(key.transforms):
            z = step.inverse(z)
        close(z, x)


def test_bytes_are_the_formula() -> None:
    """Two bits and a quarter: eight heads of 128 channels in groups of 128."""
    x = draw(1, 8, 3, 128)
    held = sum(part.nbytes for part in planted(8, 128, torch.zeros(1024), bits=2).encode(x).values())
    assert 8 * held == 2.25 * x.numel()


def test_widths_that_have_no_hadamard_transform_are_refused() -> None:
    with pytest.raises(InputError, match="power of two"):
        planted(2, 24, torch.zeros(48))
    with pytest.raises(InputError, match="clip"):
        Options(clip=1.5)


def test_evidence_is_the_mean_of_rotated_keys(llama: Model) -> None:
    seen = observed(llama, ("channels",))["channels"]
    mean = (seen["k_pre.sum"] / seen["tokens"]).float().flatten(1)  # [L,16], both heads in one transform
    close(made(llama, order="none").evidence["means"], Hadamard().forward(mean))
