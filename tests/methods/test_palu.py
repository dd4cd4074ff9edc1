"""Known answers of Palu, card B19; that its basis is the whitened one is in test_ranks.py."""

from __future__ import annotations

import functools

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.methods._gradients import fisher
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import observed
from tests.models import random_ids, with_tokenizer
from tests.running import feed, own
from tests.tolerance import close

IDS = random_ids(1, 44, seed=4)


def palu(model: Model, **settings: object) -> Plan:
    settings = {"samples": 1, "tokens": 40, **settings}
    return calibrate("palu", settings, model=with_tokenizer(model), trace=observed(model, ("gram",)))


def narrow(name: str, rank: int) -> Model:
    """Keys and values of all heads together lie in `rank` dimensions, biases included."""
    model = models.build(name)
    for module in model.attention_modules:
        if hasattr(module, "k_proj"):
            parts = [module.k_proj.weight, module.v_proj.weight]
        else:  # query, key and value of a head side by side
            fused = module.query_key_value
            split = fused.weight.data.unflatten(0, (-1, 3, model.geometry.head_dim))
            parts = [split[:, 1], split[:, 2]]
            fused.bias.data.zero_()
        for part in parts:
            flat = part.data.reshape(-1, part.shape[-1])
            u, sigma, v = torch.linalg.svd(flat, full_matrices=False)
            part.data.copy_((u[:, :rank] * sigma[:rank] @ v[:rank]).reshape(part.shape))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "rope-yarn", "rope-llama3"])
def test_keys_of_few_dimensions_lose_nothing_at_their_rank(name: str) -> None:
    """Whatever RoPE does afterwards: it is scaled, stretched, or turns half of the channels."""
    model = narrow(name, 4)
    width = min(4, model.geometry.kv_heads) * model.geometry.head_dim
    width = 3 * 8 if name == "gpt-neox" else width  # six heads make groups of three
    enough, little = (palu(model, ranks="uniform", multiple=rank, budget=rank / width, block=8) for rank in (4, 2))
    errors = [
        (feed(model, SegmentCache(model, p), IDS, [36, *[1] * 8]) - own(model, IDS)).abs().max()
        for p in (enough, little)
    ]
    assert enough.evidence["ranks"].unique().tolist() == [4]
    close(feed(model, SegmentCache(model, enough), IDS, [36, *[1] * 8]), own(model, IDS))
    assert float(errors[1]) > 1e-2


@pytest.mark.parametrize("name", ["llama", "rope-yarn"])
def test_fisher_is_the_gradient_of_the_weights(name: str) -> None:
    """Against autograd on the projections themselves, under the model's own attention."""
    model = models.build(name)
    samples = [Sample(random_ids(1, 30 + n, seed=n)[0], "text") for n in range(2)]
    found, squares = fisher(model, samples, lambda *_: None), {}
    weights = [getattr(m, f"{side}_proj").weight for m in model.attention_modules for side in "kv"]
    for sample in samples:
        for weight in weights:
            weight.requires_grad_(True).grad = None
        logits = model.network(input_ids=sample.tokens[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sample.tokens[1:]).backward()
        for at, weight in enumerate(weights):
            squares[at] = squares.get(at, 0) + weight.grad.square() / len(samples)
    expected = torch.tensor([float(squares[at].sqrt().mean()) for at in range(len(weights))]).reshape(-1, 2)
    close(found.float() / expected, torch.ones_like(expected))


def test_what_the_loss_does_not_feel_gets_the_least() -> None:
    """Planted: nothing that layer 1 attends to comes out, and layer 2 only looks at itself: its keys do not matter."""
    model = models.build("llama")
    model.network.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.network.model.layers[2].self_attn.q_proj.weight.data.zero_()
    ranks = palu(model, budget=0.5, multiple=2).evidence["ranks"].tolist()
    assert ranks[1] == [2, 2]
    assert ranks[2][0] == 2
    assert min(ranks[0][1], ranks[2][1]) > 6


@functools.cache
def seen(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys before RoPE and values of one text, [1,K,T,D] a layer."""
    model = models.shared(name)
    views = _training.states(model, Sample(random_ids(1, 80, seed=11)[0], "text"))
    return [(view.k_pre[None], view.v[None]) for view in views]


@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
def test_the_error_falls_with_rank_to_none(side: int, llama: Model) -> None:
    plans = [palu(llama, ranks="uniform", multiple=1, budget=budget) for budget in (1 / 16, 0.25, 0.5, 0.75, 15 / 16)]
    for layer, pair in enumerate(seen("llama")):
        encodings = [(p.store.keys, p.store.values)[side][layer] for p in plans]
        errors = [float((e.decode(e.encode(pair[side]), 8) - pair[side]).square().sum()) for e in encodings]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.05 * errors[0]


@pytest.mark.parametrize(
    ("bits", "expected"), [(16, 8 / 16), (4, (8 * 4 + 32) / (16 * 32)), (3, (8 * 3 + 32) / (16 * 32))]
)
def test_bytes_of_a_latent(bits: int, expected: float, llama: Model) -> None:
    """16·r/n bits a number of the model's, or b·r/n and two 16-bit ranges per n: here r = 8, n = 16, fp32."""
    budget = 0.5 if bits == 16 else 0.5 * bits / 16
    made = palu(llama, ranks="uniform", bits=bits, budget=budget, block=8)
    cache = SegmentCache(llama, made)
    feed(llama, cache, random_ids(2, 64, seed=1), [64])
    held = [lane.bulk for layer in cache.segments for lane in layer.lanes()]
    assert {bulk.length for bulk in held} == {64}
    assert sum(bulk.read_bytes() for bulk in held) == expected * 2 * 3 * 2 * 64 * 16 * 4


def test_energy_deals_no_worse_than_uniform(llama: Model) -> None:
    kept = {}
    for rule in ("uniform", "energy"):
        facts = palu(llama, ranks=rule, multiple=2, budget=0.5).provenance["facts"]
        kept[rule] = facts["key_energy"] + facts["value_energy"]
        assert facts["key_rank"] + facts["value_rank"] == pytest.approx(1.0)
    assert kept["energy"] >= kept["uniform"]


def test_impossible_options(llama: Model) -> None:
    for settings in (dict(budget=0.0), dict(budget=1.5), dict(bits=12), dict(bits=4, multiple=4), dict(group_heads=0)):
        with pytest.raises(InputError):
            palu(llama, **settings)
