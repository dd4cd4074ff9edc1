"""Known answers of SentenceKV, card C6; runs themselves are in tests/cache/keep/test_runs.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.methods.sentencekv import Options, ends
from tests import models
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close

MARKS = Options().marks


@pytest.mark.parametrize("text", [".", " .", "...", "?!", '."', ".\n", "!)", "\n\n", " \n\n ", "。", "”."])
def test_tokens_that_end_a_sentence(text: str) -> None:
    assert ends(text, MARKS)


@pytest.mark.parametrize("text", ["", " ", "a", ".com", "e.g.", "3.", ",", '"', "\n", ".5", ";"])
def test_tokens_that_do_not(text: str) -> None:
    assert not ends(text, MARKS)


def test_the_vocabulary_is_searched() -> None:
    model = models.with_tokenizer(models.shared("llama"))
    made = calibrate("sentencekv", {}, model=model)
    assert made.read is not None
    assert made.read.ends is not None
    assert [chr(token) for token in made.read.ends] == ["!", ".", "?"]
    with pytest.raises(InputError, match="by their tokens"):
        calibrate("sentencekv", {}, model=models.shared("llama"))


def test_without_a_mark_the_prompt_is_one_sentence() -> None:
    """Then the running sentence is as long as the answer, and only its first tokens read everything."""
    model = models.with_tokenizer(models.double("llama"))
    letters = random_ids(1, 40, seed=5) % 26 + 97
    made = calibrate("sentencekv", dict(budget=4, factor=0, whole=3, sink=0, recent=1), model=model)
    cache = SegmentCache(model, made)
    logits = feed(model, cache, letters, [35, *[1] * 5])
    (lane,) = cache.segments[0].lanes()
    assert lane.reader.units.sizes[0].tolist() == [[39], [39]]
    dense = own(model, letters)
    close(logits[:, :38], dense[:, :38], torch.float32)
    assert float((logits - dense)[:, 38:].abs().amax(-1).min()) > 1e-2


def test_what_is_kept_and_what_is_read() -> None:
    """A prompt of 900 tokens at budget 90 and factor 3: 270 entries of each head are kept, 90 of them read."""
    model = models.with_tokenizer(models.shared("llama"))
    made = calibrate("sentencekv", dict(budget=90, factor=3, sink=4, recent=20, whole=0, heads="mean"), model=model)
    cache = SegmentCache(model, made, prompt_length=900)
    feed(model, cache, random_ids(1, 901, seed=6), [900, 1])
    assert cache.entries().tolist() == [[271, 271]] * 3
    (lane,) = cache.segments[2].lanes()
    entry = 2 * model.geometry.head_dim * 4 * model.geometry.kv_heads
    means = sum(part.nbytes for part in (lane.reader.units.means,))
    assert lane.read_bytes() == means + (66 + 4 + 20) * entry


def test_bytes_besides_what_is_kept() -> None:
    """For n sentences their means and sizes, and a number per entry and KV head; no more for longer sentences."""
    model = models.with_tokenizer(models.shared("llama"))
    made = calibrate("sentencekv", dict(budget=90, factor=3, sink=4, recent=16, window=16), model=model)
    cache, ids = SegmentCache(model, made, prompt_length=400), random_ids(1, 401, seed=7)
    feed(model, cache, ids, [400, 1])
    (lane,) = cache.segments[1].lanes()
    ended = sum(chr(token) in ".!?" for token in ids[0, :-17].tolist())  # before the last entry that left the window
    runs, kv_heads = lane.reader.units.sizes.shape[2], model.geometry.kv_heads
    assert ended <= runs <= ended + 1
    held = sum(part.nbytes for part in lane.reader.units.buffers())
    assert held == kv_heads * (runs * (model.geometry.head_dim + 1) + lane.bulk.length) * 4
