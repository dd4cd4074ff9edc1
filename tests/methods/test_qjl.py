"""Known answers of QJL, card B12, and a planted case: loud channels no longer drown the others."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.encoding.codecs.sketched import signs
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Linear
from kvtool.errors import InputError
from kvtool.methods._rotations import sketch
from kvtool.methods.qjl import at
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import observed
from tests.methods.coding import bits, entries, share, there_and_back
from tests.tolerance import close, same

D = 128


def qjl(model: Model, **settings: object) -> Plan:
    return calibrate("qjl", settings, model=model, trace=observed(model, ("channels",)))


def estimates(rows: int, draws: int, *, gaussian: bool) -> tuple[torch.Tensor, float, torch.Tensor]:
    """q·k̂ of one pair under so many sketches; q·k; ‖q‖²‖k‖²."""
    q, k = entries(D, seed=1), entries(D, seed=2) + 0.1 * entries(D, seed=1)
    found = []
    for seed in range(draws):
        draw = torch.Generator().manual_seed(seed)
        drawn = torch.randn(D, rows, generator=draw) if gaussian else sketch(D, rows // D, draw)
        encoding = Encoding(signs(rows), (Linear(drawn[None], drawn.T[None] / rows),))
        found.append(there_and_back(encoding, k[None, None, None]).flatten() @ q)
    return torch.stack(found), float(q @ k), q.square().sum() * k.square().sum()


def test_unbiased_with_the_variance_of_its_formula() -> None:
    seen, true, size = estimates(256, 400, gaussian=True)
    variance = float((math.pi / 2 * size - true**2) / 256)
    assert abs(float(seen.mean()) - true) < 3 * (variance / 400) ** 0.5
    assert float(seen.var()) == pytest.approx(variance, rel=0.2)


def test_rotations_err_less_than_gaussians() -> None:
    """Of m = D orthogonal columns the error's mean square is π/2 − 1 of ‖q‖²‖k‖²/D, of Gaussian ones π/2."""
    seen, true, size = estimates(D, 300, gaussian=False)
    assert abs(float(seen.mean()) - true * (1 + 1 / (4 * D))) < 3 * float(seen.std()) / 300**0.5
    assert float(seen.var() * D / size) == pytest.approx(math.pi / 2 - 1, rel=0.2)


def test_more_rows_err_less(induction: Model) -> None:
    x, q = entries(1, 4, 64, D), entries(1, 4, 8, D, seed=1)
    errors = []
    for copies in (1, 2, 4, 8):
        plan = qjl(induction, sketch=(copies, copies), outliers=0)
        assert plan.store is not None
        errors.append(float((q @ (there_and_back(plan.store.keys[0], x) - x).mT).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[-1]


def test_signs_and_sizes_of_keys(induction: Model) -> None:
    plan = qjl(induction)
    assert plan.store is not None
    key, x = plan.store.keys[0], entries(1, 4, 64, D)
    back = there_and_back(key, x)
    same(there_and_back(key, -x), -back)
    same(there_and_back(key, 4 * x), 4 * back)


def test_bits_as_released(induction: Model) -> None:
    """Two sketches of 256 signs and two norms: 4.25 bits a number of a key, not the 2 and more of its headline."""
    plan = qjl(induction, early=1)
    assert plan.store is not None
    early, late = plan.store.keys
    assert bits(early, 4, D) == (512 + 128) / 128 + 32 / 128
    assert bits(late, 4, D) == (256 + 256) / 128 + 32 / 128
    assert bits(plan.store.values[0], 4, D) == 2 + 32 / 32
    assert bits(qjl(induction, outliers=0).store.keys[1], 4, D) == 2 + 16 / 128  # type: ignore[union-attr]


def test_attention_reads_signs_where_both_sketches_are_as_wide(induction: Model) -> None:
    for settings, direct in ((dict(early=0), True), (dict(early=2), False), (dict(outliers=0), True)):
        key = qjl(induction, **settings).store.keys[0]  # type: ignore[union-attr]
        assert (key.packed(key.encode(entries(1, 4, 64, D))) is not None) == direct


def test_loud_channels_do_not_drown_the_others() -> None:
    """Planted: a pair of channels of each head is 30 times as large. Which, is seen; quiet queries err far less."""
    model = models.build("llama")
    loud = [[1, 5], [2, 6]]
    for layer in model.network.model.layers:
        weight = layer.self_attn.k_proj.weight.data.unflatten(0, (2, 8))
        for head, mine in enumerate(loud):
            weight[head, mine] *= 30
    x, q = entries(1, 2, 128, 8), entries(1, 2, 16, 8, seed=1)
    for head, mine in enumerate(loud):
        x[:, head, :, mine] *= 30
        q[:, head, :, mine] = 0
    errors = []
    for outliers in (0, 2):
        key = qjl(model, outliers=outliers, sketch=(4, 4), apart=(4, 4), group=8).store.keys[0]  # type: ignore[union-attr]
        errors.append(float((q @ (there_and_back(key, x) - x).mT).square().mean()))
    assert errors[1] < 0.01 * errors[0]


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125, 0.11])
def test_options_under_a_budget(budget: float, induction: Model) -> None:
    assert 0.75 * budget - 0.02 < share(qjl(induction, **at(budget))) <= budget


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(sketch=(4,)), "bad option sketch"), (dict(apart=(0, 1)), "bad option apart"),
     (dict(outliers=8), "fewer than 8 channels"), (dict(outliers=-1), "bad option outliers")],
)  # fmt: skip
def test_refusals(settings: dict[str, object], message: str, llama: Model) -> None:
    with pytest.raises(InputError, match=message):
        qjl(llama, **settings)


def test_heads_come_apart(llama: Model) -> None:
    """Each head's loud channels go with it."""
    key, x = qjl(llama, outliers=2, group=8).store.keys[0], entries(1, 2, 16, 8)  # type: ignore[union-attr]
    close(there_and_back(key.heads([1], 2), x[:, 1:]), there_and_back(key, x)[:, 1:])
