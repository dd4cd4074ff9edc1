"""The planted case: retrieval score, RazorAttention and DuoAttention point at the one head that copies."""

from __future__ import annotations

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.model import Model
from tests.laws.methods import trace
from tests.models import INDUCTION, repeated, with_tokenizer
from tests.running import feed, own


def test_all_three_find_the_induction_head(induction: Model) -> None:
    seen = trace(induction, ("retrieval", "induction"))
    razor = calibrate("razor", {"induction": 1 / 8, "echo": 0}, model=induction, trace=seen)
    duo = calibrate(
        "duo",
        dict(steps=24, lengths=(220,), passkeys=1, sink=4, recent=16, lr=0.15, full=1 / 8),
        model=with_tokenizer(induction),
    )
    scores = (seen["retrieval"]["score"], razor.evidence["induction"], duo.evidence["alpha"])
    for score in scores:
        assert divmod(int(score.argmax()), induction.geometry.query_heads) == INDUCTION
    assert razor.keep is not None
    assert duo.keep is not None
    assert torch.equal(razor.keep.full, duo.keep.full)


def test_that_head_alone_is_enough_to_copy(induction: Model) -> None:
    """With it full and all others windowed the model copies without a fault; with it windowed it cannot."""
    ids, period = torch.stack([repeated(60, 2, seed=seed) for seed in range(2)]), 60

    def accuracy(logits: torch.Tensor) -> float:
        return float((logits[:, period:-1].argmax(-1) == ids[:, period + 1 :]).float().mean())

    assert accuracy(own(induction, ids)) == 1.0
    for share, expected in ((1 / 8, 1.0), (0.0, 0.0)):  # a sink would hold one of the answers
        settings = {"induction": share, "echo": 0, "sink": 0, "recent": 8, "recent_ratio": 0, "compensate": False}
        plan = calibrate("razor", settings, model=induction, trace=trace(induction, ("induction",)))
        assert accuracy(feed(induction, SegmentCache(induction, plan, protocol="strict"), ids, [120])) == expected
