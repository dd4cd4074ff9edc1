"""Bytes go where predictions feel them, and what is promised is what a cache holds."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.measuring.divergence import Judge
from kvtool.methods import _candidates as ways
from kvtool.methods import _holding as hold
from kvtool.methods import _weighing as weigh
from kvtool.methods import allocate
from kvtool.methods._base import Context
from kvtool.methods._dealing import dealt
from kvtool.model import Geometry, Model
from kvtool.options import build
from kvtool.plan import Plan
from kvtool.slots import RAW
from tests import models
from tests.laws.methods import observed, plan
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same

BRIEF: dict[str, Any] = dict(
    length=100, group=8, sink=1, recent=3, block=8, samples=2, tokens=48, steps=24, draws=8, rivals=0, checked=0,
    bits=(1, 2, 4, 8), ranks=(0.5,), latent=(4,),
)  # fmt: skip


def allocated(model: Model, **changes: Any) -> Plan:
    return plan("allocate", model, BRIEF | changes)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `BRIEF` measures of the shared llama."""
    made = allocated(models.shared("llama"), bytes=0.4)
    return made.write(str(tmp_path_factory.mktemp("errors") / "plan"))


def test_a_layer_that_nothing_reads_gets_the_cheapest() -> None:
    model = models.build("llama")
    module: Any = model.attention_modules[1]
    module.o_proj.weight.data.zero_()
    made = allocated(model, bytes=0.4, axes=allocate.AXES[:4])
    bits = torch.stack([made.evidence[f"bits.{side}"][made.evidence["choice"][at].long()] for at, side in enumerate(
        ("keys", "values"))])  # fmt: skip
    least = [float(made.evidence[f"bits.{side}"].min()) for side in ("keys", "values")]
    same(bits[:, 1], torch.tensor(least)[:, None].expand(2, 2))
    assert float(bits[:, [0, 2]].min()) > max(least)  # the others share what it leaves
    for side in ("keys", "values"):
        assert float(made.evidence[f"effect.{side}"][:, 1].abs().max()) == 0


def test_a_layer_that_nothing_reads_leaves_a_shared_basis_to_its_neighbour() -> None:
    """Half the rank of both is then all of the one's, at half its bytes."""
    model = models.build("llama")
    module: Any = model.attention_modules[1]
    module.o_proj.weight.data.zero_()
    made = allocated(model, bytes=0.55, axes=("rank", "sharing"))
    names = made.provenance["facts"]
    for at, (side, name) in enumerate((("keys", "rank 16 of 2 layers before"), ("values", "rank 16 of 2 layers"))):
        way = names[side].index(name)
        assert float(made.evidence[f"effect.{side}"][way, :2].max()) < 1e-6
        same(made.evidence["choice"][at, :2], torch.full((2, 2), way).int())
    assert made.store is not None
    assert made.store.spans == [[0, 1]]


def planted() -> Model:
    """Four layers, of which the last two write the same keys and values: the third puts out nothing that the fourth
    would write."""
    torch.manual_seed(0)
    model = models._llama("planted", num_hidden_layers=4)(0)
    network: Any = model.network
    third, fourth = network.model.layers[2:]
    fourth.input_layernorm.weight.data.copy_(third.input_layernorm.weight)
    written = []
    for name in ("k_proj", "v_proj"):
        weight = getattr(third.self_attn, name).weight.data
        getattr(fourth.self_attn, name).weight.data.copy_(weight)
        written.append(weight * third.input_layernorm.weight.data)
    seen = torch.linalg.qr(torch.cat(written).T)[0]
    for module in (third.self_attn.o_proj, third.mlp.down_proj):
        module.weight.data -= seen @ (seen.T @ module.weight.data)
        module.weight.data *= 0.2  # nor much that would change the length that norms divide by
    return model


def test_layers_that_write_the_same_share_it_and_others_do_not() -> None:
    """All take 8 bits a number in the mean: half the rank in 16 bits, or 4 bits and their ranges."""
    model = planted()
    made = allocated(model, bytes=0.54, length=400, axes=("bits", "sharing"), bits=(4,))
    names, effect = made.provenance["facts"], made.evidence
    for side, suffix in (("keys", " before"), ("values", "")):
        shared, coded = names[side].index(f"rank 16 of 2 layers{suffix}"), names[side].index("4 bits")
        assert effect[f"bits.{side}"][[shared, coded]].tolist() == [8, 8]
        costs = effect[f"effect.{side}"][[shared, coded]].unflatten(1, (2, 2)).sum((2, 3))
        assert costs[0, 1] < costs[1, 1]
        assert costs[0, 0] > 10 * costs[1, 0]
    assert made.store is not None
    assert made.store.spans == [[2, 3]]
    same(effect["first"], torch.tensor([0, 1, 2, 2]).int())


def test_no_way_to_share_is_better_than_the_one_that_is_dealt() -> None:
    """Every plan of four layers with one head, in pairs that may be written as one."""
    draw = torch.Generator().manual_seed(3)
    context = Context(Geometry("", 4, 2, 1, 8, 16, 10, (None,) * 4, ""))
    plain, pair = (Encoding(),), ((0, 1), (2, 3))
    kinds = [ways.Candidate("small", plain), ways.Candidate("large", plain), ways.Candidate("one", plain * 2, pair)]
    candidates = dict.fromkeys(hold.SIDES, kinds)
    size = {side: torch.tensor([2.0, 6.0, 3.0]).double() for side in hold.SIDES}
    ratio = {side: torch.ones(3).double() for side in hold.SIDES}
    error = {
        side: torch.rand(3, 4, 1, generator=draw).double() * torch.tensor([4.0, 1.0, 1.5])[:, None, None]
        for side in hold.SIDES
    }

    def weighed(layer: int, side: str, way: int) -> tuple[float, float]:
        return float(size[side][way]), float(error[side][way, layer, 0])

    groups = []
    for layers in pair:
        places = [(layer, side) for layer in layers for side in hold.SIDES]
        every = [tuple(zip(places, each, strict=True)) for each in product((0, 1), repeat=4)]
        every += [
            tuple(((layer, side), way) for layer in layers for side, way in zip(hold.SIDES, each, strict=True))
            for each in product((0, 1, 2), repeat=2)
        ]
        groups.append([torch.tensor([weighed(*place, way) for place, way in each]).sum(0) for each in every])
    totals = torch.stack([one + two for one, two in product(*groups)])
    choice, made = dealt(context, candidates, size, error, ratio, 6, "head")
    for spent, least in made.path.tolist():
        close(totals[totals[:, 0] <= spent + 1e-3, 1].min(), torch.tensor(least))
    among = [dealt(context, candidates, size, error, ratio, bits, "head")[0].first for bits in (2, 2.5, 3, 3.5, 4, 6)]
    assert any(first.tolist() != [0, 1, 2, 3] for first in among)  # or this test could not fail
    assert choice.first.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(8))
def test_layers_that_share_nothing_are_not_written_as_one(seed: int) -> None:
    """Held alike they take and cost the same as apart, but for rounding."""
    draw = torch.Generator().manual_seed(seed)
    context = Context(Geometry("", 6, 6, 3, 8, 16, 10, (None,) * 6, ""))
    groups = ((0, 1), (2, 3), (4, 5))
    kinds = [ways.Candidate("small", (Encoding(),)), ways.Candidate("one", (Encoding(),) * 3, groups)]
    error = torch.rand(2, 6, 3, generator=draw, dtype=torch.float64)
    choice, _ = dealt(
        context, dict.fromkeys(hold.SIDES, kinds), dict.fromkeys(hold.SIDES, torch.tensor([2.0, 3.0]).double()),
        dict.fromkeys(hold.SIDES, error), dict.fromkeys(hold.SIDES, torch.ones(2).double()), 2, "head",
    )  # fmt: skip
    assert not choice.ways.any()
    assert choice.first.tolist() == [0, 1, 2, 3, 4, 5]


def test_groups_within_groups() -> None:
    """Two layers of four may share, all four, or none; a leftover group has what suits it."""
    model = models._llama("deep", num_hidden_layers=6)(0)
    made = allocated(model, bytes=0.5, layers=(1, 2, 4), axes=("latent", "sharing"))
    names = made.provenance["facts"]["values"]
    assert [name for name in names if "layers" in name] == [
        f"rank {8 * layers} of {layers} layers{codes}" for layers in (1, 2, 4) for codes in ("", " in 4 bits")
    ]
    assert made.store is not None
    made.store.check(model.geometry.kv_heads, model.geometry.head_dim)
    size = {len(made.store.span(layer)) for layer in range(6)}
    assert size <= {1, 2, 4}
    assert float(made.evidence["effect.values"][names.index("rank 32 of 4 layers")].min()) > 0  # of the last two too
    for bad in ((2, 3), (8,), (), (0, 2)):
        with pytest.raises(InputError, match="layers"):
            allocate.Options(layers=bad)


def test_a_side_beside_a_shared_one_keeps_its_heads_tables(llama: Model, errors: str) -> None:
    """Values in a basis of each head, under keys in one of two layers; the third layer has a group of its own."""
    context = Context(llama.geometry, llama)
    moments = torch.randn(3, 2, 30, 8, generator=torch.Generator().manual_seed(0)).double()
    gram = moments.mT @ moments
    groups = [(0, 1), (2,)]
    (key,) = ways.shared(lambda group: torch.eye(16 * len(group)), gram, groups, (0.5,))
    value = ways.low_rank(gram, None, 5)
    store = hold.uniform(context, key.before(), value, hold.Windows(1, 3, 8)).store
    assert store is not None
    assert store.spans == [[0, 1]]
    x = torch.randn(1, 4, 16, 8, generator=torch.Generator().manual_seed(1))
    encoding = store.values[int(store.index[0, 0])]
    apart = torch.cat(
        [value.of(layer).decode(value.of(layer).encode(part), 8) for layer, part in enumerate(x.chunk(2, 1))], 1
    )
    same(encoding.decode(encoding.encode(x), 8), apart)
    assert key.bits(2, 8) == 8
    assert not key.fits((0, 1, 2))
    assert key.fits((2,))


def test_what_is_held_is_what_is_promised(llama: Model, errors: str) -> None:
    made = allocated(llama, bytes=0.3, errors=errors)
    assert made.store is not None
    assert made.store.spans  # and shared entries count once
    cache = SegmentCache(llama, made)
    feed(llama, cache, random_ids(1, 100, seed=1), [100])
    encoded = sum(
        part.nbytes for layer in cache.segments for lane in layer.lanes() for part in lane.bulk.buffers()  # type: ignore[attr-defined]
    )  # fmt: skip
    g, facts = llama.geometry, made.provenance["facts"]
    numbers = 2 * g.layers * g.kv_heads * g.head_dim * (100 - BRIEF["sink"] - BRIEF["recent"])  # 96: whole blocks
    close(torch.tensor(8 * encoded / numbers), torch.tensor(facts["bits"]))
    assert facts["held"] <= 0.3
    close(torch.tensor(facts["held"]), torch.tensor((4 + 96 * facts["bits"] / 16) / 100))


def test_the_sum_is_what_one_encoding_everywhere_costs(llama: Model, errors: str) -> None:
    """Predicted KL of a candidate in all heads is what is measured on the same texts."""
    made = allocated(llama, bytes=0.3, errors=errors)
    context = Context(llama.geometry, models.with_tokenizer(llama))
    texts = weigh.samples(context, count=2, tokens=48, steps=24)
    names = made.provenance["facts"]["keys"]
    windows = hold.Windows(BRIEF["sink"], BRIEF["recent"], BRIEF["block"])
    alike = hold.uniform(context, ways.coded("keys", 2, 8, 8), ways.sixteen(), windows)
    measured = Judge(llama, texts).divergences(alike).mean()
    way = names.index("2 bits")
    close(made.evidence["effect.keys"][way].sum() * made.evidence["ratio.keys"][way], measured.float())


def test_more_bytes_less_error_and_never_above_the_best_uniform(llama: Model, errors: str) -> None:
    """A uniform pair of no more bits is one of the choices that were weighed."""
    last = float("inf")
    context = Context(llama.geometry, llama, observed(llama, allocate.STATISTICS))
    options = build(allocate.Options, {**BRIEF, "errors": errors}, "allocate")
    context.resume.update(allocate.given(context, options))
    candidates = allocate.weighed(context, options, weigh.known(context))
    for share in (0.3, 0.4, 0.6):
        made = allocated(llama, bytes=share, errors=errors)
        size, effect, ratio = (
            {side: made.evidence[f"{name}.{side}"].double() for side in hold.SIDES}
            for name in ("bits", "effect", "ratio")
        )
        error = {side: effect[side] * ratio[side][:, None, None] for side in hold.SIDES}
        facts = made.provenance["facts"]
        best = allocate.rivals(candidates, size, error, ratio, facts["bits"], 1)
        assert facts["predicted"] <= last
        assert all(facts["predicted"] <= pair.error for pair in best)
        last = facts["predicted"]


def test_units(llama: Model, errors: str) -> None:
    choice = allocated(llama, bytes=0.45, unit="layer", errors=errors).evidence["choice"]
    same(choice[:, :, 0], choice[:, :, 1])
    apart = allocated(llama, bytes=0.45, errors=errors).evidence["choice"]
    assert bool((apart[:, :, 0] != apart[:, :, 1]).any())


def test_axes(llama: Model) -> None:
    made = allocated(llama, bytes=0.4, axes=("bits",), rope="after")
    assert made.provenance["facts"]["keys"] == ["16", "1 bits", "2 bits", "4 bits", "8 bits"]
    assert all(not encoding.transforms for encoding in made.store.keys)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="axis"):
        allocated(llama, axes=("bit",))


def test_all_bytes_change_nothing(llama: Model) -> None:
    store = allocated(llama, bytes=1.0).store
    assert store is not None
    assert bool((store.index == RAW).all())


def test_layers_with_windows_stay_raw() -> None:
    gemma3 = models.shared("gemma3")
    store = allocated(gemma3, bytes=0.3).store
    assert store is not None
    windowed = torch.tensor([window is not None for window in gemma3.geometry.windows])
    same((store.index == RAW).all(1), windowed)


def test_budgets_that_cannot_be_met(llama: Model, errors: str) -> None:
    with pytest.raises(InputError, match="raw entries alone"):
        allocated(llama, bytes=0.03)
    with pytest.raises(InputError, match="cheapest"):
        allocated(llama, bytes=0.06, errors=errors)


def test_the_outcome_of_the_comparison_is_told(llama: Model, errors: str) -> None:
    facts = allocated(llama, bytes=0.45, rivals=3, checked=1, errors=errors).provenance["facts"]
    assert len(facts["uniform"]) == 3
    assert all(row["bits"] <= 16 * (0.45 * 100 - 4) / 96 for row in facts["uniform"])
    assert facts["best"] == (facts["kl"] < min(row["kl"] for row in facts["uniform"]))


def test_another_budget_from_the_same_errors(llama: Model, errors: str) -> None:
    again, anew = allocated(llama, bytes=0.6, errors=errors), allocated(llama, bytes=0.6)
    same(again.evidence["choice"], anew.evidence["choice"])
    with pytest.raises(InputError, match="other encodings"):
        allocated(llama, bytes=0.6, errors=errors, bits=(2, 3))
    for other in (dict(bits=(1, 2, 3, 8)), dict(recent=4), dict(group=4)):  # as many as then
        with pytest.raises(InputError, match="other encodings"):
            allocated(llama, bytes=0.6, errors=errors, **other)


def moments(seed: int, width: int = 6) -> torch.Tensor:
    x = torch.randn(1, 2, 40, width, generator=torch.Generator().manual_seed(seed)).double()
    return x.mT @ x


def test_a_basis_errs_by_the_energy_it_drops() -> None:
    gram, metric = moments(0), moments(1)
    root = torch.linalg.cholesky(metric)
    energy = torch.linalg.eigvalsh(root.mT @ gram @ root)[0]
    for rank in (1, 3, 5):
        step = ways.bases(gram, metric, rank)[0]
        left = torch.eye(6) - step.down.double() @ step.up.double()
        error = torch.einsum("kij,kjl,klm,kim->k", left.mT, gram[0], left, metric[0])
        close(error / energy.sum(1), energy[:, : 6 - rank].sum(1) / energy.sum(1), torch.float16)  # damping
    step = ways.bases(gram, metric, 6)[0]
    close(step.down @ step.up, torch.eye(6).expand(2, 6, 6))


def test_channels_that_are_large_and_met() -> None:
    gram, metric = torch.diag_embed(torch.tensor([[[9.0, 1.0, 4.0, 5.0]]])), torch.diag_embed(
        torch.tensor([[[0.1, 9.0, 1.0, 1.0]]])
    )  # fmt: skip
    step: Any = ways.channels(gram, metric, 2).of(0).transforms[0]
    assert step.index.tolist() == [[1, 3]]  # 0.9, 9, 4, 5


def test_a_metric_turned_back_meets_what_queries_meet() -> None:
    """An error e of keys before RoPE at position j is met as q·R_j e."""
    model = models.shared("llama")
    rotary, places = model.rotary(0), torch.arange(5)
    q = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    e = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    turned = ways.unturned((q.mT @ q)[None], [rotary], 5, model.device)[0]
    rotated = rotary.rotate(e[None, :, None].expand(1, 2, 5, 8), rotary.table(places))[0]
    expected = torch.einsum("ktd,kpd->ktp", q, rotated).square().sum(1).mean(1)
    close(torch.einsum("kd,kde,ke->k", e, turned.float(), e), expected)
