"""Known answers of TransMLA, card B23, as far as it is built."""

from __future__ import annotations

import functools

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods import _ranks, _roped, _training
from kvtool.methods._roped import Mixed
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.statistics._base import States
from tests import models
from tests.laws.methods import observed
from tests.models import random_ids, with_tokenizer
from tests.running import feed, own
from tests.tolerance import close

IDS = random_ids(1, 44, seed=4)
TURNS = ["llama", "gpt-neox", "cohere", "rope-yarn", "gpt-oss"]  # halves, half of the channels, neighbours, stretched


def transmla(model: Model, **settings: object) -> Plan:
    settings = {"samples": 0, "tokens": 40, "block": 8, **settings}
    return calibrate("transmla", settings, model=with_tokenizer(model), trace=observed(model, ("gram",)))


@functools.cache
def views(name: str) -> list[States]:
    return _training.states(models.shared(name), Sample(random_ids(1, 60, seed=9)[0], "text"))


def view_of(name: str) -> States:
    return next(v for v in views(name) if models.shared(name).geometry.windows[v.layer] is None)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.double().transpose(0, 1).flatten(1)


def mixed(view: States, *, phase: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    bare = flat(view.k_pre)
    return _roped.components(bare.T @ bare, view.rotary, len(view.k), phase=phase)


@pytest.mark.parametrize("phase", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("name", TURNS)
def test_components_are_orthonormal_and_commute_with_rope(name: str, phase: bool) -> None:
    """A component of rotated keys is the rotated component: its two columns turn as the pair of channels does."""
    view = view_of(name)
    energy, columns = mixed(view, phase=phase)
    close(columns.T @ columns, torch.eye(len(columns)).double())
    bare, turned = flat(view.k_pre) @ columns, flat(view.k) @ columns
    kv_heads, _, width = view.k.shape
    for number, (a, b) in enumerate(_roped.pairs(view.rotary)):
        for component in range(kv_heads):
            at = 2 * (number * kv_heads + component)
            lone = torch.zeros(len(bare), width).double()
            lone[:, a], lone[:, b] = bare[:, at], bare[:, at + 1]
            expected = view.rotary.rotate(lone, view.table)
            close(turned[:, at], expected[:, a], torch.float32)
            close(turned[:, at + 1], expected[:, b], torch.float32)
    close(energy.repeat_interleave(2).sum() / 2, flat(view.k_pre).square().sum())


@pytest.mark.parametrize("phase", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("name", TURNS)
def test_the_error_is_the_energy_that_is_dropped(name: str, phase: bool) -> None:
    view = view_of(name)
    energy, columns = mixed(view, phase=phase)
    some = torch.rand(len(energy), generator=torch.Generator().manual_seed(2)) < 0.5
    kept = columns[:, some.repeat_interleave(2)]
    bare = flat(view.k_pre)
    close((bare - bare @ kept @ kept.T).square().sum(), energy[~some].sum())


def test_complex_weights_never_hold_less_and_find_a_turned_copy() -> None:
    view = view_of("mha")
    held = [mixed(view, phase=phase)[0].unflatten(0, (-1, 6)).cumsum(1) for phase in (False, True)]
    assert bool((held[1] >= held[0] - 1e-6 * held[0].max()).all())
    assert float((held[1] - held[0])[:, 0].min()) > 0
    keys = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)).double()
    turn = torch.polar(torch.ones(4), torch.tensor([0.7, 1.2, 1.8, 2.5])).to(torch.complex128)  # an angle for each pair
    second = torch.complex(keys[0, :, :4], keys[0, :, 4:]) * turn
    keys[1] = torch.cat([second.real, second.imag], 1)
    bare = flat(keys)
    rotary = models.shared("llama").rotary(0)
    for phase, exact in ((True, True), (False, False)):
        energy = _roped.components(bare.T @ bare, rotary, 2, phase=phase)[0].unflatten(0, (4, 2))
        assert (float(energy[:, 1].max()) < 1e-9 * float(energy.sum())) is exact


def test_copies_of_a_head_go_into_the_rope_head() -> None:
    """Planted: both KV heads' keys are alike, so one head's width of components holds all, and nothing is lost."""
    model = models.build("llama")
    for module in model.attention_modules:
        module.k_proj.weight.data[8:] = -2 * module.k_proj.weight.data[:8]
    made = transmla(model, budget=0.75, samples=1)
    close(made.evidence["rope_share"], torch.ones(3))
    assert made.evidence["ranks"].tolist() == [[8, 16]] * 3
    close(feed(model, SegmentCache(model, made), IDS, [36, *[1] * 8]), own(model, IDS))
    close(made.evidence["nope_error"], torch.zeros(3))  # there is no rest that could lose its RoPE


@pytest.mark.parametrize("name", [*TURNS, "qwen3", "mqa"])
def test_all_components_are_exact_and_all_but_one_what_they_hold(name: str) -> None:
    model = models.shared(name)
    assert transmla(model, budget=1.0).store.lossless
    view = view_of(name)
    columns = mixed(view)[1][:, :-2]
    encoding = _ranks.latent(columns[None], columns.T[None], len(view.k))
    held = (flat(view.k) @ columns @ columns.T).unflatten(1, view.k.shape[::2]).transpose(0, 1)
    close(encoding.decode(encoding.encode(view.k[None]), view.k.shape[2])[0], held.float())


@pytest.mark.parametrize("name", TURNS)
def test_rope_on_everything_converts_without_loss(name: str) -> None:
    """Card: frequencies not folded and RoPE on all heads leave the logits; so does a joint latent of full width."""
    view, weight = view_of(name), models.shared(name).output_projection(view_of(name).layer)
    energy, columns = mixed(view)
    nothing = torch.zeros(2, 1)
    whole = Mixed(columns, torch.ones(len(columns), dtype=torch.bool), 1.0, columns, nothing)
    assert _ranks.output_change(view, *whole.without_rope(view), weight) < 1e-4
    head = _roped.leading(view.rotary, len(view.k), len(energy)).repeat_interleave(2)
    part = Mixed(columns, head, 1.0, columns, nothing)
    without = _ranks.output_change(view, *part.without_rope(view), weight)
    assert without > 1e-2
    full = _ranks.output_change(view, *part.without_rope(view, 2 * len(columns)), weight)
    assert full == pytest.approx(without, rel=1e-3)
    errors = [_ranks.output_change(view, *part.without_rope(view, latent), weight) for latent in (2, 8, 16)]
    assert errors[0] > errors[2]


def test_the_report_and_the_ranks_follow_the_budget(llama: Model) -> None:
    plans = [transmla(llama, budget=budget, samples=1) for budget in (0.25, 0.5, 0.75, 1.0)]
    errors = [float(p.evidence["error"].mean()) for p in plans]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert [float(p.evidence["ranks"].double().mean()) / 16 for p in plans] == [0.25, 0.5, 0.75, 1.0]
    nope = [float(p.evidence["nope_error"].mean()) for p in plans]
    assert nope == [nope[0]] * 4  # does not depend on what is held
    assert nope[0] > 0.1
    assert float(plans[0].evidence["converted_error"].mean()) > float(plans[2].evidence["converted_error"].mean())


def test_impossible_options(llama: Model) -> None:
    for settings in (dict(budget=0.0), dict(budget=2.0), dict(samples=-1)):
        with pytest.raises(InputError):
            transmla(llama, **settings)
