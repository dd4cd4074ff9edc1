"""Spans of layers that are written as one: what the cache computes, call by call, and what it holds.

The definition runs the model's own attention over transformers' cache, in which, after every call, the entries that
have left the raw window are replaced by what the encoding of all layers of a span makes of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from kvtool import plan as plans
from kvtool.cache.bulk import Bulk
from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.codecs import Affine, Slerp
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Hadamard, Join, Linear
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan, compose
from kvtool.replay.forced import forced
from kvtool.slots import RAW, Keep, Read, Store
from tests import models
from tests.models import random_ids
from tests.running import feed, left_padded, own
from tests.tolerance import close, error, same

IDS = random_ids(2, 45, seed=31)
CHUNKS = [21, 9, *[1] * 10, 5]
SINK, RECENT, BLOCK = 1, 3, 8


def deep() -> Model:
    """Six layers in fp64."""
    model = models._llama("deep", num_hidden_layers=6)(0)
    model.network.to(torch.float64)
    return model


def latents(heads: int, rank: int, seed: int = 0) -> tuple[Join, Linear]:
    draw = torch.Generator().manual_seed(seed)
    down = torch.linalg.qr(torch.randn(1, 8 * heads, 8 * heads, generator=draw))[0][..., :rank].contiguous()
    return Join(heads), Linear(down, down.transpose(1, 2).contiguous())


def spanned(model: Model) -> Plan:
    """Layers 0–2 in one basis, keys before RoPE; 3 alone in 4 bits; 4 and 5 along one direction, values in 4 bits."""
    heads = model.geometry.kv_heads
    four = Encoding(Affine(4, 8, "channel"))
    keys = (Encoding(transforms=latents(3 * heads, 30), rotated=False), four, Encoding(Slerp(0.6, 0.2, 8)))
    values = (Encoding(transforms=latents(3 * heads, 25, seed=1)), four, four)
    index = torch.tensor([0, 0, 0, 1, 2, 2]).int()[:, None].expand(-1, heads).contiguous()
    first = torch.tensor([0, 0, 0, 3, 4, 4]).int()
    return Plan("spanned", model.fingerprint, store=Store(keys, values, index, SINK, RECENT, BLOCK, first))


class Rewritten(DynamicCache):
    """A dense cache whose older entries are what the store gives back."""

    def __init__(self, model: Model, store: Store):
        super().__init__(config=model.network.config)
        self.model, self.store, self.done = model, store, SINK

    def settle(self) -> None:
        """What a call leaves behind it."""
        tokens = self.get_seq_length()
        end = SINK + max(0, tokens - SINK - RECENT) // BLOCK * BLOCK
        moved = slice(self.done, end)
        spans = [span for layer in range(len(self.layers)) if (span := self.store.span(layer))[0] == layer]
        for span in spans if self.done < end else ():
            number = int(self.store.index[span[0], 0])
            if number == RAW:
                continue
            table = self.model.rotary(0).table(torch.arange(moved.start, moved.stop))
            sides = (("keys", self.store.keys[number]), ("values", self.store.values[number]))
            for side, encoding in sides:
                x = torch.cat([getattr(self.layers[layer], side)[:, :, moved] for layer in span], dim=1)
                x = x if encoding.rotated else self.model.rotary(0).unrotate(x, table)
                y = encoding.decode(encoding.encode(x), 8).to(x.dtype)
                y = y if encoding.rotated else self.model.rotary(0).rotate(y, table)
                for layer, own_part in zip(span, y.chunk(len(span), 1), strict=True):
                    getattr(self.layers[layer], side)[:, :, moved] = own_part
        self.done = max(self.done, end)


def defined(model: Model, store: Store, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    cache, logits = Rewritten(model, store), []
    with torch.no_grad():
        for piece in ids.split(chunks, 1):
            logits.append(model.network(input_ids=piece, past_key_values=cache, use_cache=True).logits)
            cache.settle()
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("chunks", [CHUNKS, [45], [1] * 45], ids=["mixed", "whole", "steps"])
def test_the_definition(chunks: list[int]) -> None:
    model = deep()
    made = spanned(model)
    assert made.store is not None
    got = feed(model, SegmentCache(model, made), IDS, chunks)
    close(got, defined(model, made.store, IDS, chunks), torch.float32)
    if chunks != [45]:
        assert error(got, own(model, IDS)) > 1e-2  # or this test could not fail


def test_single_precision_reads_what_is_written() -> None:
    """Kernels read joined latents without decoding them; in fp32, one basis for keys too after RoPE."""
    model = models.build("llama")
    shared = Encoding(transforms=latents(3 * model.geometry.kv_heads, 48))
    index, first = torch.zeros(3, model.geometry.kv_heads).int(), torch.zeros(3).int()
    made = Plan("shared", model.fingerprint, store=Store((shared,), (shared,), index, SINK, RECENT, BLOCK, first))
    close(feed(model, SegmentCache(model, made), IDS, CHUNKS), own(model, IDS), torch.float32)


def test_forced_is_decode_token_by_token() -> None:
    model = deep()
    made = spanned(model)
    cache = SegmentCache(model, made)
    feed(model, cache, IDS[:, :30], [30])
    close(
        forced(model, cache, IDS[:, 30:]), feed(model, SegmentCache(model, made), IDS, [30, *[1] * 15])[:, 30:].float()
    )


def test_rows_of_a_padded_batch() -> None:
    model = deep()
    made, rows = spanned(model), [random_ids(1, length, seed=length)[0] for length in (40, 26, 9)]
    ids, mask = left_padded(rows)
    together = feed(model, SegmentCache(model, made), ids, [34, *[1] * 6], mask=mask)
    for index, row in enumerate(rows):
        alone = feed(model, SegmentCache(model, made), row[None], [len(row) - 6, *[1] * 6])
        close(together[index, -len(row) :], alone[0], torch.float32)


def test_rows_move_with_their_spans() -> None:
    model = deep()
    made = spanned(model)
    cache, order = SegmentCache(model, made), torch.tensor([1, 0, 1])
    feed(model, cache, IDS[:, :40], [30, *[1] * 10])
    cache.batch_select_indices(order)
    with model.served(), torch.no_grad():
        after = model.network(input_ids=IDS[order, 40:41], past_key_values=cache).logits
    expected = feed(model, SegmentCache(model, made), IDS[:, :41], [30, *[1] * 11])[order, -1:]
    close(after, expected, torch.float32)


def test_the_bytes_are_the_pools() -> None:
    """The first layer of a span answers for all of it; a layer reads what is written as one whole, and its own share of
    what is not."""
    model = deep()
    cache = SegmentCache(model, spanned(model))
    feed(model, cache, IDS, CHUNKS)
    coded, rows, heads = (45 - SINK - RECENT) // BLOCK * BLOCK, 2, model.geometry.kv_heads
    four = rows * heads * coded * (8 / 2 + 4)  # 4 bits, scale and zero in fp16
    kept = coded // 8 * 2
    slerp = rows * heads * coded * (8 * 2 + 2 * 2) + rows * heads * kept * (1 + 2 * 8 * 8)
    written = [(rows * coded * 30 * 8, rows * coded * 25 * 8), (0, 0), (0, 0), (four, four), (slerp, 2 * four), (0, 0)]
    read = [written[0]] * 3 + [(four, four), (slerp, four), (slerp, four)]
    for layer, (held, seen) in enumerate(zip(written, read, strict=True)):
        (lane,) = cache.segments[layer].lanes()
        assert isinstance(lane, Bulk)
        assert sum(buffer.nbytes for buffer in lane.bulk.buffers()) == sum(held)
        assert (lane.bulk.key_bytes(), lane.bulk.read_bytes()) == (seen[0], sum(seen))


def test_a_plan_file_keeps_the_spans(tmp_path) -> None:
    model = deep()
    made = spanned(model)
    read = plans.read(made.write(str(tmp_path / "plan")))
    assert read.store is not None
    assert read.store.spans == [[0, 1, 2], [4, 5]]
    same(feed(model, SegmentCache(model, read), IDS, CHUNKS), feed(model, SegmentCache(model, made), IDS, CHUNKS))


def test_spans_and_layers_compose() -> None:
    """Layers that a store across layers leaves alone take the other plan's encoding; spans of both are kept."""
    model = deep()
    heads = model.geometry.kv_heads
    basis = Encoding(transforms=latents(2 * heads, 32))
    index, first = torch.full((6, heads), RAW).int(), torch.tensor([0, 0, 2, 3, 4, 5]).int()
    index[:2] = 0
    across = Plan("across", model.fingerprint, store=Store((basis,), (basis,), index, 0, RECENT, BLOCK, first))
    other = replace(
        across, store=Store((basis,), (basis,), index.flip(0), 0, 2, BLOCK, first.new_tensor([0, 1, 2, 3, 4, 4]))
    )
    both = compose(across, other)
    four = Encoding(Affine(4, 8, "channel"))
    bits = Plan("bits", model.fingerprint, store=Store((four,), (four,), torch.zeros_like(index), SINK, 0, BLOCK))
    made = compose(both, bits)
    assert made.store is not None
    assert made.store.spans == [[0, 1], [4, 5]]
    assert (made.store.sink, made.store.recent) == (SINK, RECENT)
    kinds = [made.store.keys[int(number)] for number in made.store.index[:, 0]]
    assert [(len(kind.transforms), type(kind.codec)) for kind in kinds] == [(n, Affine) for n in (2, 2, 0, 0, 2, 2)]
    close(feed(model, SegmentCache(model, made), IDS, CHUNKS), defined(model, made.store, IDS, CHUNKS), torch.float32)
    shifted = replace(
        across, store=replace(across.store, first=first.new_tensor([0, 1, 1, 3, 4, 5]), index=index.roll(1, 0))
    )
    with pytest.raises(InputError, match="not the same ones"):
        compose(across, shifted)


def test_what_cannot_be_written_as_one_is_refused() -> None:
    model = deep()
    made, heads = spanned(model), model.geometry.kv_heads
    assert made.store is not None
    with pytest.raises(InputError, match="bad spans"):
        replace(made.store, first=torch.tensor([0, 0, 1, 3, 4, 4]).int())
    with pytest.raises(InputError, match="bad spans"):
        replace(made.store, first=torch.tensor([0, 1, 0, 3, 4, 4]).int())
    mixed = made.store.index.clone()
    mixed[1] = 1
    with pytest.raises(InputError, match="layers 0 to 2 cannot be written as one"):
        SegmentCache(model, replace(made, store=replace(made.store, index=mixed)))
    with pytest.raises(InputError, match="a multiple of 6"):  # a basis for three layers, used by one alone
        SegmentCache(model, replace(made, store=replace(made.store, first=torch.tensor([0, 1, 2, 3, 4, 4]).int())))
    gone = torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.uint8)
    keep = Keep.heads(torch.ones(6, heads), sink=0, recent=1, dropped=gone)
    with pytest.raises(InputError, match="layer 4 drops entries of its own"):
        SegmentCache(model, replace(made, keep=keep))
    budget = torch.ones(6)
    budget[5] = 0.5
    with pytest.raises(InputError, match="cannot each choose what they read"):
        SegmentCache(model, replace(made, read=Read(budget)))
    with pytest.raises(InputError, match="Use the protocol official"):
        SegmentCache(model, made, protocol="strict")


def test_layers_outside_of_spans_may_choose_what_they_read() -> None:
    model = deep()
    made = spanned(model)
    read = Read(torch.tensor([1.0, 1.0, 1.0, 0.3, 1.0, 1.0]), unit=8)
    logits = feed(model, SegmentCache(model, replace(made, read=read)), IDS, CHUNKS)
    assert error(logits, feed(model, SegmentCache(model, made), IDS, CHUNKS)) > 1e-4


def test_a_rotation_of_each_head_of_a_span_stays_its_own() -> None:
    """Transforms that mix no heads read, in a span, what they would alone."""
    model = deep()
    heads = model.geometry.kv_heads
    turned = Encoding(Affine(3, 8, "channel"), (Hadamard(),))
    index = torch.zeros(6, heads).int()
    alone = Store((turned,), (turned,), index, SINK, RECENT, BLOCK)
    joined = replace(alone, first=torch.tensor([0, 0, 2, 2, 2, 2]).int())
    outs = [
        feed(model, SegmentCache(model, Plan("p", model.fingerprint, store=s)), IDS, CHUNKS) for s in (alone, joined)
    ]
    close(*outs, torch.float32)
