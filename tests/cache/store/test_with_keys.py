"""Values that are written with their keys, read by queries that must say where they stand."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.store.coded import Coded
from kvtool.encoding.codecs import Raw, WithKeys
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Gather
from kvtool.errors import InputError
from kvtool.plan import compose
from kvtool.slots import RAW
from kvtool_kernels.ops import attend
from tests import models
from tests.cache.share.apart import asked, document, together
from tests.laws.stores import stored
from tests.models import random_ids
from tests.tolerance import close, same

DRAW = torch.Generator().manual_seed(0)
K, V, Q = (torch.randn(1, heads, 20, 8, generator=DRAW) for heads in (2, 2, 4))


def parts_of(*channels: int) -> tuple[Encoding, Encoding]:
    """These channels of [key | key without RoPE | value], eight each."""
    return Encoding(Raw(), (Gather(torch.tensor([channels]), of=24),)), Encoding(WithKeys())


@pytest.mark.parametrize("name", ["llama", "cohere", "rope-yarn"])
def test_a_key_without_rope_has_no_place(name: str) -> None:
    """Written at one place and read from any other, it meets the query as if neither had been turned."""
    rotary = models.shared(name).rotary(0)
    start = rotary.table(torch.zeros(20, dtype=torch.long))
    found = []
    for place, asking in ((0, 100), (31, 57)):
        turned = rotary.table(torch.arange(place, place + 20))
        coded = Coded(*parts_of(*range(8, 24)), rotary)
        coded.positions = lambda low, high, place=place: torch.arange(place + low, place + high)
        coded.append(rotary.rotate(K, turned), V)
        q = rotary.rotate(Q, rotary.table(torch.arange(asking, asking + 20)))
        found.append(coded.attend(coded.faced(q, Step(asking - 7, 0.3, origin=7)), Step(0, 0.3)))
    close(found[0][0], found[1][0])
    close(found[0][0], attend(rotary.rotate(Q, start), rotary.rotate(K, start), V, scale=0.3)[0])


def test_keys_with_rope_are_the_models_own() -> None:
    rotary = models.shared("llama").rotary(0)
    coded = Coded(*parts_of(*range(8), *range(16, 24)), rotary)
    coded.append(K, V)
    close(coded.attend(coded.faced(Q, Step(20, 0.3)), Step(20, 0.3))[0], attend(Q, K, V, scale=0.3)[0])
    same(coded.recall()[1], V)
    assert sum(buffer.nbytes for buffer in coded.buffers()) == K.nbytes + V.nbytes


@pytest.mark.parametrize("name", ["with-keys", "joined-with-keys"])
def test_a_document_is_read_from_where_the_question_stands(name: str) -> None:
    """Several questions at once about one document, whose blocks are all coded before they come: as if it were fed."""
    model = models.double("llama")
    plan, text, questions = stored(model, name), random_ids(1, 36, seed=3)[0], random_ids(2, 6, seed=4)
    held = document(model, None, text, plan)
    found = asked(model, together(model, [held], None), questions, chunks=(4, 1, 1))
    for row, question in zip(found, questions, strict=True):
        cache = document(model, None, text, plan)
        close(row, asked(model, cache, question[None], chunks=(4, 1, 1))[0], torch.float32)


def test_what_it_does_not_go_with() -> None:
    model = models.shared("llama")
    joint = stored(model, "joined-with-keys")
    with pytest.raises(InputError, match="write numbers down"):
        compose(joint, stored(model, "four-bits"))
    with pytest.raises(InputError, match="another width"):
        SegmentCache(model, compose(stored(model, "channels"), joint))
    assert joint.store is not None
    older = stored(model, "joined-direct").store
    assert older is not None
    aged = type(joint)("aged", model.fingerprint, store=type(older)(
        joint.store.keys, joint.store.values, joint.store.index, held=8, block=8, older=older
    ))  # fmt: skip
    with pytest.raises(InputError, match="with age"):
        SegmentCache(model, aged)
    assert joint.store.joint
    assert not type(older)((), (), torch.full((2, 2), RAW)).joint
