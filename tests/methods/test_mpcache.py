"""MPCache's static part: what some late query looks at, in the mean over heads, by eager attention. Its dynamic part:
two levels of pages."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.read.board import Board, Place
from kvtool.cache.read.reader import Reader
from kvtool.cache.read.summaries import between
from kvtool.cache.read.summaries._base import Given
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segments import Dense
from kvtool.calibrate import calibrate
from kvtool.corpus.text import text
from kvtool.errors import InputError
from kvtool.methods._filled import scored
from kvtool.plan import Plan
from kvtool.slots import Read
from tests import models
from tests.methods.evicting import STEP, D, H, K, lane, prompted, select
from tests.models import random_ids
from tests.running import feed
from tests.statistics.naive import Seen, written_down
from tests.tolerance import close, same

TOKENS = 50
IDS = random_ids(1, TOKENS, seed=41)


def made(model, **settings) -> Plan:
    return calibrate("mpcache", {"part": "static"} | settings, model=models.with_tokenizer(model))


def pages(**settings) -> Read:
    """What a plan for a tiny model reads."""
    read = made(models.shared("llama"), **(dict(part="dynamic", sink=0) | settings)).read
    assert read is not None
    return read


def reading(read: Read, k: torch.Tensor) -> tuple[Reader, Dense]:
    reader, bulk = Reader(read, Place(0, 0, (0, 1), Board())), Dense()
    reader.append(k, k)
    bulk.append(k, k)
    return reader, bulk


def looked(layer: Seen, rows: int, code: bool) -> torch.Tensor:
    """[T]: the largest mean over heads that one of the newest rows gives each entry."""
    if not code:
        return layer.weights[:, -rows:].mean(0).amax(0)
    group = len(layer.q) // len(layer.k)
    logits = layer.q[:, -rows:] @ layer.k.repeat_interleave(group, 0).mT  # no scale, and nobody waits for their turn
    return torch.softmax(logits.float(), -1).mean(0).amax(0)


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize(("long", "rows"), [(24000, 10), (TOKENS - 1, 5)])
def test_an_entry_stays_if_a_late_query_looks_at_it(long: int, rows: int, code: bool) -> None:
    """A fifth of the prompt's queries, half as many where the prompt is long."""
    model, threshold = models.shared("llama"), 0.05
    cache = SegmentCache(model, made(model, mode="fixed", threshold=threshold, long=long, code=code))
    feed(model, cache, IDS, [TOKENS])
    cache.finish()
    sizes = set()
    for layer, seen in zip(cache.segments, written_down(model, IDS[0]), strict=True):
        stays = looked(seen, rows, code) >= threshold
        (lane,) = layer.lanes()
        close(lane.recall()[0][0], seen.k[:, stays])
        sizes.add(int(stays.sum()))
    assert len(sizes) > 1
    assert max(sizes) < TOKENS


def test_without_a_threshold_nothing_goes() -> None:
    """Card A26."""
    model = models.shared("llama")
    cache = SegmentCache(model, made(model, mode="fixed", threshold=0.0))
    feed(model, cache, IDS, [TOKENS - 1, 1])
    same(cache.entries(), torch.full((3, 2), TOKENS))


def test_a_calibrated_threshold_keeps_its_share_of_the_texts() -> None:
    model = models.with_tokenizer(models.shared("llama"))
    plan = calibrate("mpcache", dict(budget=0.3, samples=3, tokens=60, part="static"), model=model)
    kept = torch.zeros(model.geometry.layers)
    for sample in text(model, tokens=60, samples=3, seed=0, half="calibration").samples:
        for layer, scores in enumerate(scored(model, plan.keep, sample.tokens)):
            kept[layer] += int((scores[0] >= 1).sum())
    assert bool((kept >= 0.3 * 180).all())
    assert bool((kept <= 0.3 * 180 + 2).all())  # but for ties
    assert len(set(plan.evidence["threshold"].tolist())) == 3
    capped = calibrate("mpcache", dict(budget=0.5, cap=0.2, samples=1, tokens=60, part="static"), model=model)
    cache = SegmentCache(model, capped)
    feed(model, cache, IDS, [TOKENS - 1, 1])
    assert int(cache.entries().max()) <= round(0.2 * (TOKENS - 1)) + 1


def test_one_look_is_enough() -> None:
    """The planted case: an entry that one late query of one head looks at, among others that nobody does."""
    k = torch.zeros(1, K, 60, D)
    k[:, 1, 17, 0] = 60.0
    q = torch.zeros(1, H, 60, D)
    q[:, 2, 55, 0] = 10.0
    spec = select("mpcache", mode="fixed", threshold=0.1, cap=0.05)
    index = prompted(lane(spec), q, k)
    assert 17 in index[0, 0].tolist()
    same(index[:, 0], index[:, 1])
    q[:, 2, 55], q[:, 2, 30] = 0.0, q[:, 2, 55].clone()  # an early query does not count
    assert 17 not in prompted(lane(spec), q, k)[0, 0].tolist()


def test_a_page_of_one_has_its_own_product() -> None:
    """Card A26: for every α."""
    k, q = torch.randn(1, K, 12, D), torch.randn(1, K, 3, D)
    for alpha in (0.0, 0.3, 1.0):
        given = Given(torch.full((K, 1), alpha))
        close(between.score(q, between.summarise(k[:, :, :, None], given), given), q @ k.mT)


def test_maxima_bound_what_looks_in_their_direction() -> None:
    """Card A26: α = 1 and q ≥ 0; and with the weight 0.6 not."""
    draw = torch.Generator().manual_seed(4)
    k, q = torch.randn(1, K, 40, D, generator=draw), torch.rand(1, K, 3, D, generator=draw)
    most = (q @ k.mT).unflatten(3, (-1, 4)).amax(-1)
    bounds = {}
    for alpha in (1.0, 0.6):
        given = Given(torch.full((K, 1), alpha))
        bounds[alpha] = between.score(q, between.summarise(k.unflatten(2, (-1, 4)), given), given)
    assert bool((bounds[1.0] > most).all())
    assert not bool((bounds[0.6] > most).all())


def test_pages_lie_within_the_best_larger_pages() -> None:
    """The planted case: the best lower page of all lies in a larger page whose extremes cancel, and is passed by; what
    is read, a quarter of all, lies in the better half."""
    k = torch.zeros(1, K, 16, D)
    k[..., 0] = torch.tensor([9.0, 9, -30, -30, 5, 5, 6, 6, 0, 0, -1, -1, 4, 4, 3, 3])
    reader, bulk = reading(pages(upper=4, lower=2, first=0.5, second=0.25, alpha=0.5), k)
    q = torch.zeros(1, H, 1, D)
    q[..., 0] = 1.0
    q[:, : H // 2] = -q[:, : H // 2]  # the heads of the first KV head look the other way
    reader.attend(q, bulk, STEP)
    assert reader.choice is not None
    assert reader.choice[0, :, 0].tolist() == [[5, 1], [3, 2]]
    vector = 4 * D
    assert reader.read_bytes(bulk) == K * (4 * vector + 4 * vector + 4 * 2 * vector)  # both levels, and four entries


def test_one_vector_a_page_is_held() -> None:
    """A sixteenth and a thirty-second of the keys' bytes."""
    reader, bulk = reading(pages(), torch.randn(1, K, 320, D))
    assert sum(part.nbytes for part in reader.buffers()) == bulk.key_bytes() * 3 // 32


def test_layers_read_what_their_first_one_chooses() -> None:
    assert pages(share=2).owner.tolist() == [0, 0, 2]
    model = models.shared("gemma3")
    gemma = calibrate("mpcache", dict(part="dynamic", share=2), model=model).read
    whole = [layer for layer, window in enumerate(model.geometry.windows) if window is None]
    assert [int(gemma.owner[layer]) for layer in whole] == [whole[at // 2 * 2] for at in range(len(whole))]
    with pytest.raises(InputError, match="same entries"):
        made(models.shared("llama"), part="both", share=2)


def test_both_parts_at_once() -> None:
    """Fewer entries are held, and fewer of these are read."""
    model = models.shared("llama")
    plan = made(model, part="both", budget=0.8, samples=1, tokens=60, upper=4, lower=2, sink=2)
    cache = SegmentCache(model, plan)
    feed(model, cache, IDS, [TOKENS - 3, 1, 1, 1])
    (lane,) = cache.segments[1].lanes()
    assert lane.entries() < TOKENS
    assert 0 < lane.reader.choice.shape[3] * 2 < lane.bulk.length


@pytest.mark.parametrize(
    "settings",
    [
        dict(budget=0.0), dict(observed=1.0), dict(long_observed=0.3), dict(cap=1.5), dict(upper=24), dict(second=0.0),
        dict(alpha=1.2),
    ],
)  # fmt: skip
def test_bad_options_are_refused(settings: dict) -> None:
    with pytest.raises(InputError):
        made(models.shared("llama"), **settings)
