"""The span rule: which tokens stay, and that the model then sees nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.keep.scores import closed_spans
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.running import feed, left_padded, own
from tests.tolerance import close, error, same

TEXT = "so<ab>it<cd<ef>g>was<h>that<>day<ijk>x"
PROMPT = 18  # within "was"


def made(model: Model, **settings) -> Plan:
    settings = dict(opening=("<",), closing=(">",), buffer=1) | settings
    return calibrate("span-rule", settings, model=models.with_tokenizer(model))


def tokens(text: str) -> torch.Tensor:
    return torch.tensor([[ord(character) for character in text]])


def stays(text: str, buffer: int, markers: bool) -> list[int]:
    """The places of what stays of a text, read letter by letter."""
    spans, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        if letter == "<":
            start = at if depth == 0 else start
            depth += 1
        elif letter == ">" and depth:
            depth -= 1
            spans += [(start, at)] if depth == 0 else []
    gone = set()
    for first, last in spans[: len(spans) - buffer]:
        if markers and last == len(text) - 1:
            continue  # the newest entry always stays, and a span goes as a whole
        gone |= set(range(first, last + 1)) if markers else set(range(first + 1, last))
    return [at for at in range(len(text)) if at not in gone]


def held(cache: SegmentCache) -> list[str]:
    return ["".join(map(chr, lane.tokens[0, head])) for layer in cache.segments for lane in layer.lanes()
            for head in range(len(lane.heads))]  # fmt: skip


@pytest.mark.parametrize("markers", [False, True])
@pytest.mark.parametrize("buffer", [0, 1, 2])
def test_what_stays_at_every_step(buffer: int, markers: bool) -> None:
    model = models.shared("llama")
    cache = SegmentCache(model, made(model, buffer=buffer, markers=markers))
    feed(model, cache, tokens(TEXT[:PROMPT]), [PROMPT])
    cache.finish()
    for end in range(PROMPT, len(TEXT) + 1):
        expected = "".join(TEXT[at] for at in stays(TEXT[:end], buffer, markers))
        assert held(cache) == [expected] * 6
        if end < len(TEXT):
            with model.served(), torch.no_grad():
                model.network(input_ids=tokens(TEXT[end]), past_key_values=cache)


def test_the_model_sees_what_stays_and_nothing_else() -> None:
    """A forward with a mask of what each row may see."""
    model = models.double("llama")
    mask = torch.full((1, 1, len(TEXT), len(TEXT)), float("-inf"), dtype=torch.float64)
    for row in range(len(TEXT)):
        seen = range(row + 1) if row < PROMPT else [*stays(TEXT[:row], 1, False), row]
        mask[0, 0, row, list(seen)] = 0.0
    with torch.no_grad():
        expected = model.network(input_ids=tokens(TEXT), attention_mask=mask).logits
    chunks = [PROMPT, *[1] * (len(TEXT) - PROMPT)]
    close(feed(model, SegmentCache(model, made(model)), tokens(TEXT), chunks), expected, torch.float32)
    assert error(expected, own(model, tokens(TEXT))) > 0.1


def test_a_rule_that_never_fires_is_the_full_cache() -> None:
    """Card C19: no span is closed beyond the buffer."""
    model, chunks = models.double("llama"), [20, *[1] * 10]
    for text, settings in ((TEXT[:30], dict(buffer=9)), ("all of this <is open, and so it is", {})):
        logits = feed(model, SegmentCache(model, made(model, **settings)), tokens(text[:30]), chunks)
        close(logits, own(model, tokens(text[:30])), torch.float32)


def test_positions_close_up() -> None:
    """A gap in front of all that counts: what follows moves together, so nothing changes but for the dropped span."""
    model = models.double("llama")
    plans = [made(model, buffer=0, position=position) for position in ("original", "reindex")]
    ids, chunks = tokens("a<bc>de<fg>hi<jkl>m"), [8, *[1] * 11]
    outs = [feed(model, SegmentCache(model, plan), ids, chunks) for plan in plans]
    assert error(*outs) > 1e-3
    caches = [SegmentCache(model, plan) for plan in plans]
    for cache in caches:
        feed(model, cache, ids, chunks)
    assert held(caches[0]) == held(caches[1]) == ["a<>de<>hi<>m"] * 6
    bare, there = [], torch.tensor(stays("a<bc>de<fg>hi<jkl>m", 0, False))
    for cache, places in zip(caches, (there, torch.arange(19 - len(there), 19)), strict=True):
        k = next(cache.segments[0].lanes()).recall()[0]
        bare.append(model.rotary(0).unrotate(k, model.rotary(0).table(places)))
    close(bare[0], bare[1], torch.float32)  # the first layer's keys know nothing but token and place


@pytest.mark.parametrize(
    ("name", "text", "buffer", "markers"),
    [
        ("llama", TEXT, 1, False),
        ("qwen3", "<ab>c<de>f<gh>ijk<l>m<no>pq", 0, True),
        ("mqa", TEXT, 2, True),
        ("rope-yarn", TEXT, 0, True),
    ],
)
def test_fed_again_nothing_of_a_span_remains(name: str, text: str, buffer: int, markers: bool) -> None:
    """Card C19: at every step the logits are those of a fresh prompt of the tokens held, which knew no other."""
    model = models.double(name)
    plan = made(model, buffer=buffer, markers=markers, position="reencode")
    cache = SegmentCache(model, plan)
    chunks = [PROMPT, *[1] * (len(text) - PROMPT)]
    got = feed(model, cache, tokens(text), chunks)
    moved = SegmentCache(model, made(model, buffer=buffer, markers=markers, position="reindex"))
    assert error(got, feed(model, moved, tokens(text), chunks)) > 1e-3
    expected = [own(model, tokens(text[:PROMPT]))]
    for end in range(PROMPT, len(text)):
        left = [*stays(text[:end], buffer, markers), end]
        expected.append(own(model, tokens("".join(text[at] for at in left)))[:, -1:])
    close(got, torch.cat(expected, dim=1), torch.float32)
    assert cache.nbytes == moved.nbytes


def test_feeding_again_costs_what_stands_behind() -> None:
    """`>` alone behind the first span, which is the last token; `>d<e>` behind the second; nothing without a span."""
    model = models.double("llama")
    for text, buffer, costs in (("a<bc>d", 0, [0, 1, 0]), ("a<b>d<e>", 1, [0, 0, 5]), ("a<b>d<ef", 1, [0, 0, 0])):
        cache = SegmentCache(model, made(model, buffer=buffer, position="reencode"))
        feed(model, cache, tokens(text[:-3]), [len(text) - 3])
        for at, cost in zip(range(len(text) - 3, len(text)), costs, strict=True):
            before = cache.fed_again
            with model.served(), torch.no_grad():
                model.network(input_ids=tokens(text[at]), past_key_values=cache)
            assert cache.fed_again - before == cost


def test_who_stood_behind_a_span_knows_who_stood_before_it() -> None:
    """B follows A once the span between them is gone: a head that looks for what followed A finds it only where B was
    fed again. Before, B's entry says that it followed a marker."""
    model = models.with_tokenizer(models.induction_model())
    text, found = "kmA<qrs>Bnop", {}
    for position in ("original", "reindex", "reencode"):
        cache = SegmentCache(model, made(model, buffer=0, markers=True, position=position))
        logits = feed(model, cache, tokens(text + "A"), [len(text), 1])
        found[position] = chr(int(logits[0, -1].argmax()))
    assert found["reencode"] == "B"
    assert "B" not in (found["original"], found["reindex"])


def test_fed_again_in_a_batch_and_by_chunks() -> None:
    """Rows whose spans end at other steps, with padding, are each as alone; tokens fed together end in the same."""
    model = models.double("llama")
    plan = made(model, buffer=0, position="reencode")
    texts = [TEXT[:26], TEXT[4:26]]
    ids, mask = left_padded([tokens(text)[0] for text in texts])
    whole = SegmentCache(model, plan)
    feed(model, whole, ids, [16, *[1] * 10], mask=mask)
    for row, text in enumerate(texts):
        alone, pieces = (SegmentCache(model, plan) for _ in range(2))
        feed(model, alone, tokens(text), [len(text) - 10, *[1] * 10])
        feed(model, pieces, tokens(text), [len(text) - 10, 1, 3, 5, 1])
        for layer, batched in enumerate(whole.segments):
            (lane,), (part,) = alone.segments[layer].lanes(), [p for p in batched.parts if p.rows == [row]]
            for other in (part.lanes[0], next(pieces.segments[layer].lanes())):
                for mine, theirs in zip(lane.recall()[:2], other.recall()[:2], strict=True):
                    close(mine, theirs, torch.float32)


def test_feeding_again_is_refused_where_it_cannot_be() -> None:
    gemma = models.shared("gemma3")
    with pytest.raises(InputError, match="a window has let some of them go"):
        SegmentCache(gemma, made(gemma, position="reencode"))
    keep = made(models.shared("llama")).keep
    assert keep is not None
    assert keep.select is not None
    with pytest.raises(InputError, match="drops the same ones"):
        replace(keep, select=replace(keep.select, score="key-norm"), position="reencode")


def test_bytes_go_with_the_spans() -> None:
    model = models.shared("llama")
    text = "<" + "z" * 60 + ">" + "a" * 20 + "<b>"
    cache = SegmentCache(model, made(model))
    feed(model, cache, tokens(text), [len(text) - 1, 1])
    same(cache.entries(), torch.full((3, 2), len(text) - 60))


def test_several_kinds_of_spans_and_long_markers() -> None:
    model = models.shared("llama")
    plan = made(model, opening=("[a]", "(("), closing=("[z]", "))"), buffer=0)
    cache = SegmentCache(model, plan)
    feed(model, cache, tokens("x[a]one[z]y((two))w[a]three"), [26, 1])
    assert held(cache) == ["x[a][z]y(())w[a]three"] * 6


def test_a_model_without_words_is_refused() -> None:
    with pytest.raises(InputError, match="by their tokens"):
        calibrate("span-rule", {}, model=models.shared("llama"))


def test_a_step_that_ends_no_marker_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = models.shared("llama"), []
    monkeypatch.setattr(closed_spans, "score", lambda view, score=closed_spans.score: looked.append(1) or score(view))
    cache = SegmentCache(model, made(model))
    feed(model, cache, tokens(TEXT), [PROMPT, *[1] * (len(TEXT) - PROMPT)])
    markers = sum(letter in "<>" for letter in TEXT[PROMPT:])
    assert len(looked) <= model.geometry.layers * (1 + 2 * markers) < model.geometry.layers * (len(TEXT) - PROMPT)
    assert held(cache)[0] == "".join(TEXT[at] for at in stays(TEXT, 1, False))
