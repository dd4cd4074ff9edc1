"""Changes of attention outputs against the cache that makes them, and their price against the divergence they cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Sample
from kvtool.encoding.codecs import Affine, Raw
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Join, Linear
from kvtool.measuring import effects
from kvtool.measuring.divergence import Judge
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.replay.forced import forced
from kvtool.replay.subject import Subject
from kvtool.slots import RAW, Store
from tests import models
from tests.models import random_ids
from tests.tolerance import close, same

IDS = random_ids(1, 60, seed=5)[0]
SAMPLE = Sample(IDS[:40], "text", answer=IDS[40:])
SINK, RECENT, BLOCK = 2, 5, 8
CODES: dict[effects.Side, Encoding] = {
    "keys": Encoding(Affine(2, 8, "token")), "values": Encoding(Affine(2, 8, "channel")),
}  # fmt: skip
BEFORE = Encoding(Affine(2, 8, "token"), rotated=False)


def stored(model: Model, side: str, encoding: Encoding, layers: list[int], first: list[int] | None = None) -> Plan:
    """One side of these layers encoded, everything else as it is."""
    spans = None if first is None else torch.tensor(first).int()
    index = torch.full((model.geometry.layers, model.geometry.kv_heads), RAW, dtype=torch.int32)
    index[layers] = 0
    pair = (encoding, Encoding()) if side == "keys" else (Encoding(), encoding)
    return Plan("one", model.fingerprint, store=Store((pair[0],), (pair[1],), index, SINK, RECENT, BLOCK, spans))


def outputs(model: Model, plan: Plan, layer: int) -> torch.Tensor:
    """What the layer's output projection is given while the answer is decoded, [T,H·D]."""
    seen: list[torch.Tensor] = []
    cache = SegmentCache(model, plan)
    assert SAMPLE.answer is not None
    module: Any = model.attention_modules[layer]
    projection = module.o_proj if hasattr(module, "o_proj") else module.dense
    with model.served(), torch.no_grad():
        model.network.base_model(input_ids=SAMPLE.tokens[None, :-1], past_key_values=cache)
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    forced(model, cache, torch.cat([SAMPLE.tokens[-1:], SAMPLE.answer[:-1]])[None])
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(
    ("name", "side", "encoding"),
    [
        ("llama", "keys", CODES["keys"]), ("llama", "values", CODES["values"]), ("llama", "keys", BEFORE),
        ("gemma2", "keys", CODES["keys"]), ("gpt-oss", "keys", CODES["keys"]), ("gpt-oss", "values", CODES["values"]),
        ("gpt-neox", "keys", BEFORE),
    ],
)  # fmt: skip
def test_a_change_is_what_decode_steps_compute(name: str, side: effects.Side, encoding: Encoding) -> None:
    model = models.shared(name) if name == "gpt-oss" else models.double(name)  # its experts know no fp64
    seen = effects.views(model, SAMPLE, draws=1)
    assert sorted(seen) == [layer for layer, window in enumerate(model.geometry.windows) if window is None]
    layer, view = next(iter(seen.items()))  # whatever is before it is untouched
    change = view.change(side, encoding, view.coded(SINK, RECENT, BLOCK))
    assert float(change.abs().max()) > 1e-3
    expected = outputs(model, stored(model, side, encoding, [layer]), layer)
    close((view.out + change).transpose(0, 1).flatten(1), expected, torch.float32)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_change_of_layers_that_are_written_as_one(side: effects.Side) -> None:
    """The first layer puts nothing out, so that the second finds the entries that it would find anyway."""
    model = models.build("llama")
    model.network.to(torch.float64)
    first: Any = model.attention_modules[0]
    first.o_proj.weight.data.zero_()
    width = 2 * model.geometry.kv_heads * model.geometry.head_dim
    down = torch.linalg.qr(torch.randn(1, width, 12, generator=torch.Generator().manual_seed(0)))[0]
    basis = Linear(down, down.mT.contiguous())
    encoding = Encoding(Raw("float16"), (Join(2 * model.geometry.kv_heads), basis), rotated=side == "values")
    seen = effects.views(model, SAMPLE, draws=1)
    made = effects.changes([seen[0], seen[1]], side, encoding, seen[0].coded(SINK, RECENT, BLOCK))
    plan = stored(model, side, encoding, [0, 1], [0, 0, 2])
    for layer, change in enumerate(made):
        assert float(change.abs().max()) > 1e-3
        expected = outputs(model, plan, layer)
        close((seen[layer].out + change).transpose(0, 1).flatten(1), expected, torch.float32)


def test_what_an_error_of_a_logit_costs() -> None:
    """Moving one logit moves log p by w·g·(v − o): here by finite differences."""
    view = effects.views(models.double("llama"), SAMPLE, draws=2)[1]
    coded = view.coded(SINK, RECENT, BLOCK)
    step, total = 1e-5, torch.zeros(2, 6).double()
    logits = view.weights.double().log()
    values = view.v.double().repeat_interleave(3, 0)
    for entry in coded.any(0).nonzero().flatten().tolist():
        moved = logits.clone()
        moved[:, :, entry] += step
        change = (moved.softmax(-1) - logits.softmax(-1)) @ values / step
        slope = (view.gradient.double() * change).sum(-1) * coded[:, entry]
        total += slope.square().sum(-1)
    close(view.felt(coded), total.mean(0).unflatten(0, (2, 3)).sum(1), torch.float32)


def test_nothing_encoded_nothing_changed() -> None:
    model = models.shared("llama")
    view = effects.views(model, SAMPLE, draws=2)[0]
    none = view.change("keys", CODES["keys"], view.coded(SINK, 900, BLOCK))
    same = view.change("values", Encoding(Raw("float32")), view.coded(SINK, RECENT, BLOCK))
    assert float(none.abs().max()) == 0
    close(same, torch.zeros_like(same))
    close(view.effect(same), torch.zeros(2).double(), torch.float32)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_the_price_of_small_changes_is_the_divergence_they_cause(side: effects.Side) -> None:
    model = models.double("llama")
    axis: Any = "token" if side == "keys" else "channel"
    encoding = Encoding(Affine(6, 8, axis))
    seen = effects.views(model, SAMPLE, draws=200)
    for layer, view in seen.items():
        priced = float(view.effect(view.change(side, encoding, view.coded(SINK, RECENT, BLOCK))).sum())
        caused = float(Judge(model, [SAMPLE]).divergences(stored(model, side, encoding, [layer]))[0])
        assert 0.5 < priced / caused < 2.0, layer


def test_heads_are_priced_apart() -> None:
    view = effects.views(models.shared("llama"), SAMPLE, draws=3)[1]
    change = torch.randn(view.out.shape, generator=torch.Generator().manual_seed(0))
    alone = change.clone()
    alone[3:] = 0  # query heads of the second KV head
    both, first = view.effect(change), view.effect(alone)
    close(first[0], both[0])
    assert float(first[1]) == 0


def test_a_judge_against_decoding_token_by_token() -> None:
    model = models.double("llama")
    plan = stored(model, "keys", CODES["keys"], [0, 1, 2])
    subject = Subject(model, plan)
    caches = subject.both(SAMPLE.tokens[None, :-1])
    assert SAMPLE.answer is not None
    total = torch.zeros(2).double()
    for token, true in zip(torch.cat([SAMPLE.tokens[-1:], SAMPLE.answer[:-1]]), SAMPLE.answer, strict=True):
        full, own = (subject.step(caches[side], token[None, None]).log_softmax(-1) for side in ("full", "plan"))
        total += torch.stack([(full.exp() * (full - own)).sum(), (full - own)[0, true]])
    judge = Judge(model, [SAMPLE, SAMPLE])
    assert float(total.abs().min()) > 1e-3
    close(judge.judged(plan), (total / 20).expand(2, 2), torch.float32)
    same(judge.divergences(plan), judge.judged(plan)[:, 0])
