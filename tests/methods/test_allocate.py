"""Bytes go where predictions feel them, and what is promised is what a cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.errors import InputError
from kvtool.measuring.divergence import Judge
from kvtool.methods import _candidates as ways
from kvtool.methods import _weighing as weigh
from kvtool.methods import allocate
from kvtool.methods._base import Context
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import RAW
from tests import models
from tests.laws.methods import plan
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
    made = allocated(model, bytes=0.4)
    bits = torch.stack([made.evidence[f"bits.{side}"][made.evidence["choice"][at].long()] for at, side in enumerate(
        ("keys", "values"))])  # fmt: skip
    least = [float(made.evidence[f"bits.{side}"].min()) for side in ("keys", "values")]
    same(bits[:, 1], torch.tensor(least)[:, None].expand(2, 2))
    assert float(bits[:, [0, 2]].min()) > max(least)  # the others share what it leaves
    for side in ("keys", "values"):
        assert float(made.evidence[f"effect.{side}"][:, 1].abs().max()) == 0


def test_what_is_held_is_what_is_promised(llama: Model, errors: str) -> None:
    made = allocated(llama, bytes=0.3, errors=errors)
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
    windows = weigh.Windows(BRIEF["sink"], BRIEF["recent"], BRIEF["block"])
    alike = weigh.uniform(context, ways.coded("keys", 2, 8, 8), ways.sixteen(), windows)
    measured = Judge(llama, texts).divergences(alike).mean()
    way = names.index("2 bits")
    close(made.evidence["effect.keys"][way].sum() * made.evidence["ratio.keys"][way], measured.float())


def test_more_bytes_less_error_and_never_above_the_best_uniform(llama: Model, errors: str) -> None:
    """A uniform pair of no more bits is one of the choices that were weighed."""
    last = float("inf")
    for share in (0.3, 0.4, 0.6):
        made = allocated(llama, bytes=share, errors=errors)
        size, effect, ratio = (
            {side: made.evidence[f"{name}.{side}"].double() for side in weigh.SIDES}
            for name in ("bits", "effect", "ratio")
        )
        error = {side: effect[side] * ratio[side][:, None, None] for side in weigh.SIDES}
        facts = made.provenance["facts"]
        best = allocate.rivals(size, error, ratio, facts["bits"], 1)
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
