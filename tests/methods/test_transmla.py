"""Known answers of TransMLA, card B23."""

from __future__ import annotations

import functools

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.store.coded import Coded
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods import _ranks, _roped, _training
from kvtool.methods._roped import Latent, Mixed
from kvtool.model import Model
from kvtool.plan import Plan, compose
from kvtool.slots import Read
from kvtool.statistics._base import States
from kvtool_kernels.ops import attend
from tests import models
from tests.laws.methods import observed
from tests.models import random_ids, with_tokenizer
from tests.running import feed, own
from tests.tolerance import close

IDS = random_ids(1, 44, seed=4)
TURNS = ["llama", "gpt-neox", "cohere", "rope-yarn", "gpt-oss"]  # halves, half of the channels, neighbours, stretched


def transmla(model: Model, **settings: object) -> Plan:
    settings = {"samples": 2, "tokens": 64, "checked": 0, "block": 8, **settings}
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


def columns_of(view: States, *, heads: int = 1) -> Mixed:
    energy, columns = mixed(view)
    rope = _roped.leading(view.rotary, len(view.k), len(energy), heads).repeat_interleave(2)
    return Mixed(columns, rope, 1.0, columns, torch.zeros(2, 1))


def latent_of(view: States, layer: Mixed, balance: float = 1.0) -> Latent:
    keys, values = flat(_roped.still(view, view.k)), flat(view.v)
    both, rest = torch.cat([keys, values], 1), layer.keys[:, ~layer.rope]
    norms = torch.stack([x.norm(dim=1).mean() for x in (keys @ rest, values)])
    return _roped.latent(rest, both.T @ both, norms, balance)


@pytest.mark.parametrize("form", ["latent", "roped"])
def test_copies_of_a_head_go_into_the_rope_head(form: str) -> None:
    """Planted: both KV heads' keys are alike, so one head's width of components holds all, and nothing is lost."""
    model = models.build("llama")
    for module in model.attention_modules:
        module.k_proj.weight.data[8:] = -2 * module.k_proj.weight.data[:8]
    made = transmla(model, form=form, budget=0.75, checked=1)
    close(made.evidence["rope_share"], torch.ones(3))
    assert made.evidence["ranks"].tolist() == ([[8, 16]] * 3 if form == "roped" else [16] * 3)
    close(feed(model, SegmentCache(model, made), IDS, [36, *[1] * 8]), own(model, IDS))
    close(made.evidence["nope_error"], torch.zeros(3))  # there is no rest that could lose its RoPE


def test_values_that_are_made_of_the_rest_are_held_with_it() -> None:
    """Planted: values are keys without RoPE, so that a latent as wide as these holds both; apart they take two."""
    model = models.build("llama")
    for module in model.attention_modules:
        module.v_proj.weight.data = module.k_proj.weight.data.clone()
    made = transmla(model, budget=0.75)
    close(made.evidence["joint_dropped"], torch.zeros(3))
    assert float(made.evidence["apart_dropped"].min()) > 1e-2


@pytest.mark.parametrize("name", [*TURNS, "qwen3", "mqa"])
def test_roped_all_components_are_exact_and_all_but_one_what_they_hold(name: str) -> None:
    model = models.shared(name)
    assert transmla(model, form="roped", budget=1.0).store.lossless
    view = view_of(name)
    columns = mixed(view)[1][:, :-2]
    encoding = _ranks.latent(columns[None], columns.T[None], len(view.k))
    held = (flat(view.k) @ columns @ columns.T).unflatten(1, view.k.shape[::2]).transpose(0, 1)
    close(encoding.decode(encoding.encode(view.k[None]), view.k.shape[2])[0], held.float())


@pytest.mark.parametrize("name", TURNS)
def test_rope_on_everything_converts_without_loss(name: str) -> None:
    """Card: frequencies not folded and RoPE on all heads leave the logits; without, the loss stays at full rank."""
    view, weight = view_of(name), models.shared(name).output_projection(view_of(name).layer)
    whole = columns_of(view, heads=len(view.k))
    joint = latent_of(view, whole)
    assert _ranks.output_change(view, *whole.without_rope(view, joint, len(joint.energy)), weight) < 1e-4
    part = columns_of(view)
    joint, without = latent_of(view, part), _ranks.output_change(view, *part.without_rope(view), weight)
    assert without > 1e-2
    full = _ranks.output_change(view, *part.without_rope(view, joint, len(joint.energy)), weight)
    assert full == pytest.approx(without, rel=1e-3)
    errors = [_ranks.output_change(view, *part.without_rope(view, joint, rank), weight) for rank in (2, 8, 16)]
    assert errors[0] > errors[2]


def test_balance_cancels_at_full_rank_and_not_before() -> None:
    view = view_of("llama")
    layer = columns_of(view)
    even, uneven = (latent_of(view, layer, balance) for balance in (1.0, 5.0))
    for rank, alike in ((len(even.energy), True), (8, False)):
        k = [layer.without_rope(view, joint, rank)[1] for joint in (even, uneven)]
        assert (float((k[0] - k[1]).abs().max()) < 1e-5) is alike


def test_one_latent_never_drops_more_than_two_of_as_many_numbers() -> None:
    for name in TURNS:
        joint = latent_of(view_of(name), columns_of(view_of(name)))
        dropped, apart = _ranks.left(joint.energy), _ranks.left(joint.apart)
        assert bool((dropped <= apart + 1e-9).all())
        assert float((apart - dropped).max()) > 1e-3


@pytest.mark.parametrize("name", [*TURNS, "qwen3", "mqa"])
def test_the_cache_attends_as_the_converted_layer(name: str) -> None:
    """What is written and read under RoPE's tables is q·[rope head] + q⁰·k̂⁰ and the values of the same latent."""
    view = view_of(name)
    layer = columns_of(view)
    joint = latent_of(view, layer)
    coded = Coded(*layer.pair(joint, 6, len(view.k)), view.rotary)
    coded.append(view.k[None], view.v[None])
    step = Step(view.k.shape[1] - 3, view.scale)
    query = coded.faced(view.q[None, :, -3:], step)
    out = coded.attend(query, step)[0]
    assert list(coded.parts["value"]) == []
    assert sum(x.nbytes for x in coded.buffers()) == (int(layer.rope.sum()) + 6) * view.k.shape[1] * 4
    q, k, v = (x[None] for x in layer.without_rope(view, joint, 6))
    close(out, attend(q[:, :, -3:], k, v, scale=view.scale)[0], torch.float32)
    capped = Step(step.start, step.scale, softcap=2.0)  # not by a kernel, block by block
    close(coded.attend(query, capped)[0], attend(q[:, :, -3:], k, v, scale=view.scale, softcap=2.0)[0], torch.float32)
    keys, values = coded.recall()
    close(values[0], v[0], torch.float32)
    close(query @ keys.repeat_interleave(len(view.q) // len(view.k), 1).mT, q[:, :, -3:] @ _wide(k, view).mT)


def _wide(k: torch.Tensor, view: States) -> torch.Tensor:
    return k.repeat_interleave(len(view.q) // len(view.k), 1)


@pytest.mark.parametrize(("form", "name"), [("latent", "latent_error"), ("roped", "roped_error")])
def test_the_report_and_the_ranks_follow_the_budget(form: str, name: str, llama: Model) -> None:
    plans = [transmla(llama, form=form, budget=budget, checked=1) for budget in (0.25, 0.5, 0.75, 1.0)]
    errors = [p.evidence[name].mean() for p in plans]
    assert errors == sorted(errors, reverse=True)
    close(errors[-1], plans[-1].evidence["nope_error"].mean() if form == "latent" else torch.tensor(0.0))
    assert [p.provenance["facts"]["held"] for p in plans] == [0.25, 0.5, 0.75, 1.0]
    nope = [float(p.evidence["nope_error"].mean()) for p in plans[1:]]
    assert nope == [nope[0]] * 3  # does not depend on what is held, as long as the rope head has room
    assert nope[0] > 0.1


def test_the_bytes_held_are_the_budget(llama: Model) -> None:
    raw = SegmentCache(llama, transmla(llama, recent=900))
    for budget in (0.25, 0.5):
        cache = SegmentCache(llama, transmla(llama, budget=budget))
        for each in (cache, raw):
            each.reset()
            feed(llama, each, random_ids(1, 64), [64])
        assert cache.nbytes == budget * raw.nbytes


def test_what_it_does_not_go_with(llama: Model) -> None:
    joint = transmla(llama)
    bits = calibrate("kivi", {"bits": 4, "group": 8, "block": 8}, model=llama, trace=None)
    with pytest.raises(InputError, match="write numbers down"):
        compose(joint, bits)
    reading = Plan("reading", llama.fingerprint, read=Read(torch.full((llama.geometry.layers,), 0.5), unit=4))
    with pytest.raises(InputError, match="nothing can be chosen"):
        SegmentCache(llama, compose(joint, reading))


def test_impossible_options(llama: Model) -> None:
    for settings in (dict(budget=0.0), dict(budget=2.0), dict(samples=0), dict(form="x"), dict(balance=0.0)):
        with pytest.raises(InputError):
            transmla(llama, **settings)
