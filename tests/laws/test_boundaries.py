"""Law 6, first half: one entry fewer, as many, and one more than the window holds."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep
from tests.laws.reference import dense
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, error

WINDOWS = [(0, 1), (0, 6), (1, 1), (4, 6)]
LENGTHS = [(sink, recent, beyond) for sink, recent in WINDOWS for beyond in (-1, 0, 1) if sink + recent + beyond > 0]


def windowed(model: Model, sink: int, recent: int, **options: object) -> Plan:
    g = model.geometry
    nothing = torch.zeros(g.layers, g.kv_heads, dtype=torch.bool)
    return Plan("window", model.fingerprint, keep=Keep.heads(nothing, sink=sink, recent=recent, **options))


@pytest.mark.parametrize("options", [{}, {"compensate": True}, {"position": "reindex"}], ids=str)
@pytest.mark.parametrize(("sink", "recent", "beyond"), LENGTHS)
def test_lengths_about_the_window(sink: int, recent: int, beyond: int, options: dict, model: Model) -> None:
    tokens = sink + recent + beyond
    ids, plan = random_ids(1, tokens, seed=10), windowed(model, sink, recent, **options)
    expected = dense(model, ids[0], plan, [tokens], strict=True)
    for chunks in ([tokens], [1] * tokens):
        logits = feed(model, SegmentCache(model, plan, protocol="strict"), ids, chunks)
        close(logits[0], expected)
    if beyond <= 0:
        close(expected, own(model, ids)[0])
    elif model.geometry.windows[-1] is None and not options and tokens > 2:
        assert error(expected, own(model, ids)[0]) > 1e-3


def test_reindexing_one_dropped_entry_moves_only_the_sinks(llama: Model) -> None:
    """At L = S + R + 1 positions inside the cache and true ones differ for the first time."""
    for tokens, differ in ((10, False), (11, True)):
        ids = random_ids(1, tokens, seed=11)
        outs = [
            feed(llama, SegmentCache(llama, windowed(llama, 4, 6, position=p), protocol="strict"), ids, [tokens])
            for p in ("original", "reindex")
        ]
        assert (error(*outs) > 1e-3) == differ
