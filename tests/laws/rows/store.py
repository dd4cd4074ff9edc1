"""Methods that decide how an entry is encoded."""

from __future__ import annotations

from tests.laws.rows._base import BRIEF, Options, Row

MERGED = dict(merged=1.0, recent=2, block=8, group=8)
BY_KL = MERGED | dict(mode="calibrated", by="divergence", bits=4, samples=1, tokens=40, steps=4)
CSKV = dict(samples=1, tokens=64, steps=2)
WEIGHED: Options = dict(samples=1, tokens=40, steps=16, draws=2, block=8)
DEALT: Options = WEIGHED | dict(length=96, group=8, bits=(1, 2, 4, 8), ranks=(0.5,), latent=(4,), rivals=0, checked=0)
ROWS = {
    "allocate": Row(
        tiny=(
            DEALT | dict(bytes=0.45, sink=1, recent=3),
            DEALT | dict(bytes=0.5, sink=0, recent=0, unit="layer", axes=("bits", "channels"), rope="after"),
        ),
        lossless=(DEALT | dict(bytes=1.0), DEALT | dict(recent=900)),
        ladder=tuple(
            DEALT | dict(bytes=share, sink=0, recent=0, axes=("rank", "channels"), ranks=(0.1, 0.4, 0.7))
            for share in (0.15, 0.4, 0.7, 1.0)
        ),
    ),
    "diffqkv": Row(
        tiny=(
            WEIGHED | dict(budget=0.5, sink=1, recent=3),
            WEIGHED | dict(budget=0.4, sink=0, recent=0, cut="channels", unit="side"),
        ),
        lossless=(WEIGHED | dict(budget=1.0), WEIGHED | dict(recent=900)),
        ladder=tuple(WEIGHED | dict(budget=share, sink=0, recent=0) for share in (0.15, 0.4, 0.7, 1.0)),
    ),
    "cachegen": Row(
        tiny=(
            dict(level=1, recent=3, block=4),
            dict(delta=True, group=4, block=8, rope="before", sink=2),
            dict(key_bins=(8,), value_bins=(6,), scale="head", block=1),
        ),
        lossless=(dict(recent=900),),
        ladder=tuple(dict(key_bins=(bins,), value_bins=(bins,), block=4) for bins in (4, 8, 16, 64, 256)),
        loss=1e-3,
    ),
    "gear": Row(
        tiny=(
            dict(bits=2, group=8, rank=1, recent=3, block=8),
            dict(bits=4, base="kcvt", mode="calibrated", outliers=0.0, rank=1, block=16, sink=2, **BRIEF),
        ),
        lossless=(dict(group=8, recent=900, block=8),),
        ladder=tuple(dict(bits=bits, group=8, rank=1, block=8) for bits in (1, 2, 4, 8)),
        loss=1e-3,  # keys made of zeros and ones survive much
    ),
    "kvquant": Row(
        tiny=(  # two outliers: the first layer's keys are the token's, and in the text that was read two channels tie
            dict(bits=2, outliers=0.1, recent=3, block=8, **BRIEF),
            dict(bits=3, outliers=0.2, across="head", weights="scaled", sink=1, block=4, **BRIEF),
        ),
        lossless=(dict(recent=900, block=8, **BRIEF),),
        ladder=(
            *(dict(bits=bits, qnorm=0, sink=0, block=8, **BRIEF) for bits in (1, 2, 4)),
            dict(recent=900, block=8, **BRIEF),
        ),
        loss=-1e-3,  # keys of the induction model take two values each: fitted levels are exact in one bit
    ),
    "rotatekv": Row(
        tiny=(
            dict(bits=3, group=8, recent=3, block=8),
            dict(bits=2, heads=1, order="none", sink=2, block=4),
        ),
        lossless=(dict(recent=900, block=8),),
        ladder=(*(dict(bits=bits, sink=0, block=8) for bits in (1, 2, 4)), dict(recent=900, block=8)),
    ),
    "minicache": Row(
        tiny=(MERGED | dict(retain=0.2, bits=8), MERGED | dict(mode="calibrated", merged=0.7, bits=4, sink=1), BY_KL),
        lossless=(MERGED | dict(retain=1.0), dict(recent=900)),
        ladder=(),  # where one layer's head works the other's puts out nothing: see tests/methods/test_minicache.py
    ),
    "xkv": Row(
        tiny=(
            dict(layers=2, rank_k=0.4, rank_v=0.5, recent=2, block=8, sink=0),
            dict(layers=3, rank_k=0.5, rank_v=0.4, normalise=False, recent=0, block=4, sink=1),
            dict(mode="prompt", layers=2, rank_k=0.4, rank_v=0.5, recent=2, block=8),
        ),
        lossless=(dict(layers=2, rank_k=1.0, rank_v=1.0, recent=1, block=4), dict(recent=900)),
        ladder=tuple(dict(layers=2, rank_k=s, rank_v=s, recent=0, block=8, sink=0) for s in (0.02, 0.1, 0.3, 1.0)),
    ),
    "cskv": Row(
        tiny=(
            CSKV | dict(budget=0.5, recent=3, block=8),
            CSKV | dict(budget=0.25, bits=4, start="pca", recent=0, sink=2),
        ),
        lossless=(CSKV | dict(budget=1.0, recent=1, block=8), CSKV | dict(recent=900)),
        ladder=tuple(CSKV | dict(budget=budget, start="pca", recent=0, block=8) for budget in (0.01, 0.1, 0.5, 1.0)),
    ),
    "eigen": Row(
        tiny=(
            dict(budget=0.5, recent=3, block=8),
            dict(error=0.6, floor=0.2, rule="code", samples=1, tokens=40, sink=2, block=4),
        ),
        lossless=(dict(budget=1.0, recent=1, block=8), dict(budget=0.5, recent=900)),
        ladder=tuple(dict(budget=budget, block=8) for budget in (0.02, 0.2, 0.6, 1.0)),
    ),
    "kv-heads": Row(
        tiny=(dict(heads=2, recent=3, block=8), dict(heads=2, sink=2, block=4)),
        lossless=(dict(heads=1, recent=1, block=8), dict(heads=2, recent=900)),
        ladder=(),  # one working head a layer: that model's heads fit into one
    ),
    "transmla": Row(
        tiny=(
            dict(budget=0.5, recent=3, block=8, checked=0, **BRIEF),
            dict(budget=0.6, form="roped", phase=True, sink=2, block=4, checked=0, **BRIEF),
        ),
        lossless=(dict(budget=1.0, rope=8, recent=1, block=8, **BRIEF), dict(recent=900, checked=0, **BRIEF)),
        ladder=tuple(
            dict(budget=budget, form="roped", block=8, checked=0, **BRIEF) for budget in (0.01, 0.1, 0.5, 1.0)
        ),
    ),
    "palu": Row(
        tiny=(
            dict(budget=0.5, multiple=4, recent=3, block=8, **BRIEF),
            dict(budget=0.25, ranks="energy", bits=4, group_heads=1, sink=2, block=4),
        ),
        lossless=(dict(budget=1.0, recent=1, block=8, **BRIEF), dict(ranks="uniform", recent=900)),
        ladder=tuple(dict(budget=budget, ranks="energy", block=8) for budget in (0.01, 0.1, 0.5, 1.0)),
    ),
    "kivi": Row(
        tiny=(dict(bits=2, group=8, recent=3, block=8), dict(bits=4, group=8, recent=0, block=16, sink=2)),
        lossless=(dict(group=8, recent=900, block=8),),
        ladder=tuple(dict(bits=bits, group=8, recent=0, block=8) for bits in (1, 2, 4, 8)),
        loss=1e-3,  # keys made of zeros and ones survive much
    ),
    "polarquant": Row(
        tiny=(
            dict(angle=3, radius=2, group=8, values=3, value_group=8, recent=3, block=8),
            dict(form="nested", levels=(4, 3), block=16, sink=2),
        ),
        lossless=(dict(group=8, recent=900, block=8),),
        ladder=(
            *(dict(angle=bits, radius=bits, group=8, values=bits, block=8) for bits in (1, 2, 4)),
            dict(group=8, recent=900, block=8),
        ),
        loss=1e-3,
    ),
    "qjl": Row(
        tiny=(
            dict(sketch=(4, 2), outliers=2, apart=(1, 2), early=1, values=3, group=8, recent=3, block=8),
            dict(sketch=(3, 2), outliers=0, early=1, values=4, group=4, block=8, sink=2),
        ),
        lossless=(dict(outliers=2, group=8, recent=900, block=8),),
        ladder=(),  # that model's keys are themselves random signs, so that one bit of each is enough
    ),
    "turboquant": Row(
        tiny=(
            dict(keys=2.5, values=3.5, skip=0, recent=3, block=8, **BRIEF),
            dict(keys=3, values=2, rotation="random", coding="rotated", unbiased=True, skip=0, block=8, sink=2),
        ),
        lossless=(dict(recent=900, block=8), dict(skip=20)),
        ladder=(*(dict(keys=bits, values=bits, skip=0, block=8) for bits in (1, 2, 4)), dict(skip=2)),
    ),
    "think": Row(
        tiny=(
            dict(pruned=0.4, window=5, recent=3, block=4),
            dict(pruned=0.7, mode="calibrated", recent=0, block=1),
        ),
        lossless=(dict(pruned=0.0), dict(recent=900)),
        ladder=tuple(dict(pruned=share, recent=0, block=1) for share in (0.9, 0.6, 0.3, 0.0)),
        loss=1e-3,
    ),
    "mikv": Row(
        tiny=(
            dict(high=0.4, bits=2, recent=2),
            dict(high=0.3, bits=3, group=8, recent=3, when="prefill", balance=False),
        ),
        lossless=(dict(high=1.0, when="prefill"),),
        ladder=tuple(dict(high=share, bits=1, recent=1, when="prefill") for share in (0.1, 0.3, 0.6, 1.0)),
        loss=1e-7,  # what matters to a copy is among the high entries
    ),
    "zipcache": Row(
        tiny=(dict(salient=0.5, block=5), dict(salient=0.3, high=3, low=1, block=4, mode="calibrated")),
        lossless=(dict(salient=1.0, block=900),),
        ladder=tuple(dict(high=bits, low=bits, block=1) for bits in (1, 2, 3, 4)),
        loss=1e-4,
    ),
    "saq": Row(
        tiny=(
            dict(bits=(8, 4, 2), edges=(8, 16), group=8, recent=3, block=8),
            dict(bits=(4, 2), edges=(8,), group=8, recent=0, block=8, mode="calibrated", reach=100),
        ),
        lossless=(dict(recent=900, group=8, block=8),),
        ladder=tuple(dict(bits=(2 * bits, bits), edges=(8,), group=8, recent=0, block=8) for bits in (1, 2, 3, 4)),
        loss=1e-3,
    ),
    "vidkv": Row(
        tiny=(dict(group=8, recent=3, block=8), dict(group=8, recent=0, block=8, sink=2, wide=0.25, mode="calibrated")),
        lossless=(dict(recent=900),),
        ladder=(
            dict(group=8, recent=0, block=8, wide=0.0),
            dict(group=8, recent=0, block=8, wide=1.0),
            dict(recent=900),
        ),
        loss=1e-4,
    ),
}
