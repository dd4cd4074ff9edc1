"""Known answers of TurboQuant, card B11, and a planted case: loud channels take the bits that a fraction has more."""

from __future__ import annotations

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.methods.turboquant import at
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import RAW
from tests import models
from tests.laws.methods import trace
from tests.methods.coding import bits, entries, share, there_and_back
from tests.tolerance import close, same

BRIEF = dict(samples=1, tokens=40)


def turboquant(model: Model, *, seed: int = 0, **settings: object) -> Plan:
    return calibrate("turboquant", {"skip": 0, **settings}, model=models.with_tokenizer(model), seed=seed)


def sides(plan: Plan) -> tuple[Encoding, Encoding]:
    assert plan.store is not None
    return plan.store.keys[0], plan.store.values[0]


def ragged(width: int) -> torch.Tensor:
    """Entries of all lengths whose channels differ tenfold."""
    return entries(1, 4, 256, width) * torch.logspace(-1, 1, 256)[:, None] * torch.logspace(-0.5, 0.5, width)


@pytest.mark.parametrize("rotation", ["hadamard", "random"])
@pytest.mark.parametrize(("width", "loss"), [(1, 0.3634), (2, 0.1175), (3, 0.03455), (4, 0.0095)])
def test_the_loss_of_a_unit_normal_whatever_the_entries(
    width: int, loss: float, rotation: str, induction: Model
) -> None:
    plan = turboquant(induction, keys=width, values=width, rotation=rotation, coding="rotated", correct=False)
    x = ragged(128)
    for encoding in sides(plan):
        error = (there_and_back(encoding, x) - x).square().sum(-1) / x.square().sum(-1)
        assert 0.9 * loss < float(error.mean()) < 1.03 * loss  # a little less where few channels hold the norm


def test_corrected_entries_keep_their_norm(induction: Model) -> None:
    x = ragged(128)
    for correct, shrinks in ((True, False), (False, True)):
        back = there_and_back(sides(turboquant(induction, keys=2, correct=correct))[0], x)
        kept = back.norm(dim=-1) / x.norm(dim=-1)
        assert (float(kept.mean()) < 0.99) == shrinks
        if correct:
            close(kept, torch.ones_like(kept), torch.float16)


@pytest.mark.parametrize("settings", [{}, dict(rotation="random"), dict(keys=2.25, **BRIEF)], ids=str)
def test_turning_leaves_products(settings: dict[str, object], induction: Model) -> None:
    key, _ = sides(turboquant(induction, **settings))
    q, k = entries(1, 4, 3, 128, seed=1), entries(1, 4, 5, 128, seed=2)
    z = k
    for step in key.transforms:
        z = step.forward(z)
    turned, offset = key.query(q)
    assert offset is None
    close(turned @ z.mT, q @ k.mT)


def test_bytes_of_a_slot(induction: Model) -> None:
    """Four bits of 128 channels: 66 bytes a key, 68 a value."""
    plan = turboquant(induction)
    key, value = sides(plan)
    assert bits(key, 4, 128) * 128 / 8 == 66
    assert bits(value, 4, 128) * 128 / 8 == 68


def test_bits_of_fractions(induction: Model) -> None:
    """32 channels of 3 bits and 96 of 2: 2.25, and two norms of 16 bits."""
    key, value = sides(turboquant(induction, keys=2.25, values=2.5, **BRIEF))
    assert bits(key, 4, 128) == 2.25 + 2 * 16 / 128
    assert bits(value, 4, 128) == 2.5 + 2 * 32 / 128
    unbiased, rotated = sides(turboquant(induction, keys=3, unbiased=True, values=3, coding="rotated"))
    assert bits(unbiased, 4, 128) == 3 + 2 * 16 / 128
    assert bits(rotated, 4, 128) == 3 + 16 / 128


@pytest.mark.parametrize("head", [0, 1])
def test_loud_channels_take_the_extra_bit(head: int) -> None:
    """Planted: the pairs (1, 5) and (2, 6) of one KV head, and (0, 4) and (3, 7) of the other."""
    model = models.build("llama")
    weight = model.network.model.layers[1].self_attn.k_proj.weight.data.unflatten(0, (2, 8))
    loud = [[1, 2, 5, 6], [0, 3, 4, 7]]
    for each, mine in enumerate(loud):
        weight[each, mine] *= 20
    plan = turboquant(model, keys=2.5, values=2, **BRIEF)
    assert plan.store is not None
    key = plan.store.keys[int(plan.store.index[1, head])]
    turned = key.transforms[0].forward(torch.eye(8).expand(1, 2, 8, 8))[0, head]  # a channel a row
    first = turned[:, :4].norm(dim=-1)
    close(first, torch.tensor([float(channel in loud[head]) for channel in range(8)]))


def test_the_ends_stay_raw(llama: Model) -> None:
    index = turboquant(llama, skip=1).store.index  # type: ignore[union-attr]
    assert index[:, 0].tolist() == [RAW, 0, RAW]
    assert bool((turboquant(llama, skip=9).store.index == RAW).all())  # type: ignore[union-attr]


def test_seeds_turn_differently(llama: Model) -> None:
    x = entries(1, 2, 32, 8)
    first, again, other = (there_and_back(sides(turboquant(llama, seed=seed))[0], x) for seed in (0, 0, 1))
    same(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125, 0.11])
def test_options_under_a_budget(budget: float, induction: Model) -> None:
    assert 0.75 * budget - 0.02 < share(turboquant(induction, **at(budget))) <= budget


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(keys=0.5), "bad option keys"), (dict(values=9), "bad option values"), (dict(skip=-1), "bad option skip"),
     (dict(keys=1, unbiased=True), "whole bits"), (dict(keys=2.5, unbiased=True), "whole bits")],
)  # fmt: skip
def test_refusals(settings: dict[str, object], message: str, llama: Model) -> None:
    with pytest.raises(InputError, match=message):
        turboquant(llama, **settings)


def test_fractions_need_to_see_channels(llama: Model) -> None:
    with pytest.raises(InputError, match="which channels are loud"):
        calibrate("turboquant", dict(keys=2.5), trace=trace(llama, ("gram",)))
    seen = trace(llama, ("channels",))
    made = calibrate("turboquant", dict(keys=2.5, skip=0), trace=seen)
    assert len(made.store.keys) == 3  # type: ignore[union-attr]
