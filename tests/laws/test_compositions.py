"""Plans of different slots, composed: each composition computes what its definition says and holds what its parts say.

Drafting with any plan is in `test_draft.py`, prefixes that are shared in `test_prefix.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.store.pool import Pool
from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Gather, Hadamard, Join, Linear
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan, compose
from kvtool.slots import EVERYTHING, RAW, Keep, Select, Store
from tests import models
from tests.laws.methods import ragged
from tests.laws.reference import dense
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, error

IDS = random_ids(1, 40, seed=21)
PROMPT, CHUNKS = 30, [30, *[1] * 10]
SINK, RECENT, BLOCK, GROUP = 1, 3, 8, 8


def store(model: Model, key: Encoding, value: Encoding, span: int = 1, **options: int) -> Plan:
    g = model.geometry
    index, first = torch.full((g.layers, g.kv_heads), RAW).int(), torch.arange(g.layers).int()
    whole = slice(g.layers // span * span)
    index[whole], first[whole] = 0, first[whole] // span * span
    settings = {"sink": SINK, "recent": RECENT, "block": BLOCK} | options
    return Plan("store", model.fingerprint, store=Store((key,), (value,), index, first=first, **settings))


def bits(model: Model, count: int) -> Plan:
    return store(model, Encoding(Affine(count, GROUP, "token")), Encoding(Affine(count, GROUP, "channel")))


def basis(width: int, rank: int, seed: int = 0) -> Linear:
    draw = torch.Generator().manual_seed(seed)
    down = torch.linalg.qr(torch.randn(1, width, width, generator=draw))[0][..., :rank].contiguous()
    return Linear(down, down.transpose(1, 2).contiguous())


def windows(model: Model) -> Plan:
    return replace(ragged(model, seed=3), method="duo")


def selection(model: Model, share: float = 0.5) -> Plan:
    g = model.geometry
    select = Select(torch.full((g.layers, g.kv_heads), share), observed=3, kernel=3, pool="max", recent=3)
    return Plan(
        "snap", model.fingerprint, keep=Keep.heads(torch.ones(g.layers, g.kv_heads), sink=0, recent=1, select=select)
    )


def rotation(model: Model) -> Plan:
    return store(model, Encoding(transforms=(Hadamard(),)), Encoding(transforms=(Hadamard(),)))


def low_rank(model: Model) -> Plan:
    return store(model, Encoding(transforms=(basis(8, 5),)), Encoding(transforms=(basis(8, 8),)))


def channels(model: Model) -> Plan:
    return store(model, Encoding(transforms=(Gather(torch.tensor([[0, 1, 2, 4, 6]]), of=8),)), Encoding())


def across_layers(model: Model) -> Plan:
    width = 2 * model.geometry.kv_heads * 8
    shared = Encoding(transforms=(Join(2 * model.geometry.kv_heads), basis(width, 16)))
    return store(model, replace(shared, rotated=False), shared, span=2)


COMPOSITIONS = {
    "duo + 4-bit": (windows, lambda model: bits(model, 4)),
    "duo + 2-bit + Hadamard": (windows, rotation, lambda model: bits(model, 2)),
    "eviction + 4-bit": (selection, lambda model: bits(model, 4)),
    "low rank + 4-bit latent": (low_rank, lambda model: bits(model, 4)),
    "across layers + 4-bit": (across_layers, lambda model: bits(model, 4)),
    "channels + eviction": (channels, selection),
}
EACH = pytest.mark.parametrize("name", COMPOSITIONS)


def composed(name: str, model: Model) -> Plan:
    return compose(*(part(model) for part in COMPOSITIONS[name]))


@pytest.mark.parametrize("protocol", ["official", "strict"])
@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if "layers" not in name])
def test_it_computes_its_definition(name: str, protocol: str) -> None:
    model = models.double("llama")
    made = composed(name, model)
    logits = feed(model, SegmentCache(model, made, protocol=protocol), IDS, CHUNKS)[0]  # type: ignore[arg-type]
    expected = dense(model, IDS[0], made, CHUNKS, strict=protocol == "strict")
    close(logits, expected, torch.float32)
    assert error(expected[PROMPT:], own(model, IDS)[0, PROMPT:]) > 1e-3


def test_across_layers_with_a_whole_basis_nothing_is_lost() -> None:
    for name in ("llama", "mistral", "gemma2"):  # of which every second layer has a window of its own, and is left out
        model = models.double(name)
        made = across_layers(model)
        if name == "gemma2":
            with pytest.raises(InputError, match="across heads"):
                SegmentCache(model, made)
            continue
        width = 2 * model.geometry.kv_heads * 8
        shared = Encoding(transforms=(Join(2 * model.geometry.kv_heads), basis(width, width)))
        whole = store(model, replace(shared, rotated=False), shared, span=2)
        close(feed(model, SegmentCache(model, whole), IDS, CHUNKS), own(model, IDS), torch.float32)
        assert error(feed(model, SegmentCache(model, made), IDS, CHUNKS), own(model, IDS)) > 1e-3
        with pytest.raises(InputError, match="written as one"):
            SegmentCache(model, made, protocol="strict")


def test_across_layers_every_layer_sees_the_same_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer sees is its share of the joined entries of the span, encoded together and decoded."""
    model, seen = models.double("llama"), []
    offer = Pool.offer

    def noted(pool: Pool, member: int, k: torch.Tensor, v: torch.Tensor) -> None:
        seen.append((member, k.clone(), v.clone()))
        offer(pool, member, k, v)

    monkeypatch.setattr(Pool, "offer", noted)
    made = composed("across layers + 4-bit", model)
    cache = SegmentCache(model, made)
    feed(model, cache, IDS, CHUNKS)
    assert made.store is not None
    v = [torch.cat([v for member, _, v in seen if member == layer], dim=2) for layer in (0, 1)]
    expected = made.store.values[0].decode(made.store.values[0].encode(torch.cat(v, dim=1)), 8)
    for layer in (0, 1):
        (lane,) = cache.segments[layer].lanes()
        assert isinstance(lane, Bulk)
        close(lane.bulk.recall()[1], expected[:, 2 * layer : 2 * layer + 2].to(v[0].dtype), torch.float32)


@EACH
def test_the_parts_alone_differ(name: str) -> None:
    """Every part takes part: without it the logits are others."""
    model = models.double("llama")
    parts = [part(model) for part in COMPOSITIONS[name]]
    whole = feed(model, SegmentCache(model, compose(*parts)), IDS, CHUNKS)
    for left_out in range(len(parts)):
        rest = parts[:left_out] + parts[left_out + 1 :]
        fewer = feed(model, SegmentCache(model, compose(*rest) if len(rest) > 1 else rest[0]), IDS, CHUNKS)
        assert error(whole, fewer) > 1e-6


def coded_bytes(name: str, entries: int, kv_heads: int) -> float:
    """Bytes of `entries` coded entries of `kv_heads` heads, keys and values, from the definition."""
    scales = 4.0  # fp16 scale and zero of a group
    if name == "across layers + 4-bit":  # 16 shared numbers an entry stand for 2 layers: half of them are this layer's
        key, value = 8 * (0.5 + scales / GROUP) / kv_heads, (8 * 0.5 + scales) / kv_heads
    elif name == "channels + eviction":
        key, value = 5 * 4.0, 8 * 4.0
    else:
        wide, number = (5 if "rank" in name else 8), (0.25 if "2-bit" in name else 0.5)
        key, value = wide * (number + scales / GROUP), 8 * number + scales
    return entries * kv_heads * (key + value)


@EACH
def test_the_bytes_are_the_product_of_the_parts(name: str) -> None:
    model = models.shared("llama")
    g, made = model.geometry, composed(name, model)
    cache = SegmentCache(model, made)
    feed(model, cache, IDS, CHUNKS)
    keep, tokens, expected, slack = made.keep, IDS.shape[1], 0.0, 0.0
    assert made.store is not None
    for layer in range(g.layers):
        for head in range(g.kv_heads):
            held, compensated = tokens, 0
            if keep is not None and int(keep.recent[layer, head]) != EVERYTHING:
                held = min(tokens, int(keep.sink[layer, head]) + int(keep.recent[layer, head]))
                compensated = int(keep.compensate[layer, head])
                expected += (held * 2 + compensated * 2) * 8 * 4
                continue
            if keep is not None and keep.select is not None:
                held = round(float(keep.select.budget[layer, head]) * PROMPT) + tokens - PROMPT
            coded = (held - SINK - RECENT) // BLOCK * BLOCK if int(made.store.index[layer, head]) != RAW else 0
            joined = any(layer in span for span in made.store.spans)
            kind, heads = (name, g.kv_heads) if joined else (name.replace("across layers", "apart"), 1)
            expected += (held - coded) * 2 * 8 * 4 + coded_bytes(kind, coded, heads) / heads
            slack += 2 * 2 * 64 * 8 * 4  # room to grow of the raw sinks and recent entries
    assert expected <= cache.nbytes <= expected + slack


def test_what_cannot_live_together_is_refused() -> None:
    model = models.shared("llama")
    with pytest.raises(InputError, match="two plans fill the slot 'keep'"):
        compose(windows(model), selection(model))
    with pytest.raises(InputError, match="both plans write numbers down"):
        compose(bits(model, 4), bits(model, 2))
    with pytest.raises(InputError, match="both plans write numbers down"):
        compose(bits(model, 4), rotation(model))
    with pytest.raises(InputError, match="across heads"):
        compose(
            Plan("w", model.fingerprint, keep=Keep.heads(torch.zeros(3, 2), sink=1, recent=4)), across_layers(model)
        )
    with pytest.raises(InputError, match="groups of 8 channels"):
        compose(store(model, Encoding(), Encoding(transforms=(basis(8, 6),))), bits(model, 4))
    evicting = selection(model)
    assert evicting.keep is not None
    assert evicting.keep.select is not None
    each_step = replace(evicting, keep=replace(evicting.keep, select=replace(evicting.keep.select, when="step")))
    with pytest.raises(InputError, match="one by one at every step"):
        compose(each_step, bits(model, 4))
    with pytest.raises(InputError, match="another model"):
        compose(bits(model, 4), bits(models.shared("qwen3"), 4))
