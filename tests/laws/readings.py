"""Readings that no method makes: every unit, summary, reduction, trigger and tail, for heads of 8 channels."""

from __future__ import annotations

from typing import Any

import torch

from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Read

GRAPH = dict(queries=8, nearest=4, degree=3, ef=4, wide=1)
SMALL: dict[str, Any] = dict(unit=4, sink=1, recent=3)
CASES: dict[str, dict[str, Any]] = {
    "minmax": {},
    "mean": dict(summary="mean", heads="mean"),
    "tokens": dict(unit=1, summary="mean", heads="each", page=4),
    "channels": dict(unit=1, summary="channels", rank=3),
    "channel-pages": dict(unit=2, summary="channels", rank=5, heads="sum"),
    "codes": dict(unit=1, summary="channels", rank=8, bits=4),
    "coded-pages": dict(unit=2, summary="channels", rank=8, bits=2, heads="each"),
    "low-rank": dict(unit=2, summary="low-rank", rank=4),
    "keys": dict(unit=2, summary="keys", heads="each"),
    "query-channels": dict(unit=1, summary="keys", rank=4, tail="mean", heads="each"),
    "clusters": dict(form="cluster", summary="mean", heads="mean", softmax=True, jump=0.2, period=0),
    "root-clusters": dict(form="cluster", summary="root-mean", heads="each"),
    "wave": dict(form="cluster", summary="mean", heads="sum", softmax=True, tail="estimate", estimated=0.4),
    "estimate": dict(summary="mean", tail="estimate", softmax=True),
    "rest": dict(tail="mean"),
    "outliers": dict(summary="mean", outliers=1, softmax=True),
    "exact-outliers": dict(summary="mean", outliers=2, exact=True, heads="each"),
    "period": dict(period=3),
    "once": dict(period=0),
    "jumps": dict(period=0, jump=0.3),
    "own-jumps": dict(period=4, jump=0.1, heads="each"),
    "followed": dict(owner=(0, 1, 1, 1), share=(1.0, 1.0, 0.4, 0.3)),
    "followed-tails": dict(owner=(0, 0, 0, 0), summary="mean", tail="estimate", jump=0.3, period=5),
    "followed-clusters": dict(owner=(0, 0, 2, 2), form="cluster", summary="mean", period=2),
    "slow": dict(slow=True, period=2),
    "sentences": dict(unit=1, form="run", cut="tokens", summary="mean"),
    "sentence-queries": dict(unit=2, form="run", cut="tokens", summary="mean", query="run", whole=2, heads="each"),
    "sentence-ends": dict(unit=1, form="run", cut="tokens", summary="root-mean", period=0, renew=True),
    "sentence-pages": dict(cut="tokens", period=0, renew=True, whole=1, slow=True),
    "sentence-rest": dict(unit=1, form="run", cut="tokens", summary="mean", tail="mean", whole=1),
    "alike": dict(unit=2, form="run", cut="keys", summary="mean", tail="estimate", period=3, renew=True),
    "own-runs": dict(unit=1, form="run", cut="queries", summary="mean", query="run", whole=1, period=0, renew=True),
    "segments": dict(form="cluster", cut="queries", summary="mean", heads="mean", softmax=True, period=0, renew=True),
    "segment-tails": dict(unit=2, form="cluster", cut="queries", summary="mean", tail="estimate", renew=True, period=4),
    "graph": dict(unit=1, summary="keys", heads="each", index="graph", search=GRAPH),
    "graph-of-all": dict(unit=1, summary="keys", index="graph", search=GRAPH | dict(degree=9, wide=3), slow=True),
    "inverted": dict(unit=1, summary="keys", heads="each", index="cluster", search=dict(entries=3, scan=0.5)),
    "inverted-once": dict(unit=1, summary="keys", index="cluster", search=dict(entries=2, scan=0.1), period=4),
    "two-levels": dict(unit=2, summary="minmax", heads="mean", index="pages", search=dict(coarse=2, share=0.5)),
    "two-levels-each": dict(unit=1, summary="between", heads="each", index="pages", search=dict(coarse=3, share=0.4)),
    "asked": dict(summary="mean", query="together", asked=5, period=0, bare=True, heads="layer"),
    "asked-documents": dict(
        unit=1,
        form="run",
        cut="tokens",
        summary="mean",
        query="together",
        asked=3,
        period=0,
        positions="contiguous",
        heads="layer",
    ),
    "asked-mean": dict(summary="mean", query="together", asked=4, period=2, bare=True, heads="mean", positions="far"),
    "asked-each": dict(summary="mean", query="together", asked=50, period=3, positions="contiguous", heads="each"),
    "bare": dict(summary="minmax", bare=True, heads="mean", positions="contiguous", slow=True, period=2),
    "probe": dict(summary="attended", rank=2, query="probe", asked=4, bare=True, cosine=True, heads="layer"),
    "usual-probe": dict(summary="mean", query="probe", asked=3, usual=True, cosine=True, heads="mean", positions="far"),
    "attended": dict(summary="attended", rank=1, heads="max", positions="far", bare=True),
    "counted": dict(share=(9.0, 6.0, 1.0, 1.0)),
}


def reading(model: Model, name: str, share: float = 0.4, **slots: Any) -> Plan:
    """A plan whose read is one of the cases, of a budget `share` unless the case has its own; 4 layers at most."""
    g, draw = model.geometry, torch.Generator().manual_seed(3)
    options = SMALL | CASES[name]
    shares = torch.tensor(options.pop("share", (share,) * 4))[: g.layers]
    if "owner" in options:
        options["owner"] = torch.tensor(options["owner"])[: g.layers].int()
    if options.get("cut") == "tokens":
        options["ends"] = torch.arange(0, 128, 5).int()
    elif "cut" in options:
        options["apart"] = torch.tensor([0.3, 0.1, 0.2, 0.3])[: g.layers]
    if options.get("summary") == "channels":
        noise = torch.rand(g.layers, g.kv_heads, g.head_dim, generator=draw)
        options["table"] = noise.argsort(-1).int()
    if "usual" in options:
        usual = torch.randn(g.layers, g.kv_heads, g.group, 2, g.head_dim, generator=draw)
        options["usual"] = usual.abs() + 0.1
    if options.get("summary") == "between":
        options["table"] = torch.rand(g.layers, g.kv_heads, 1, generator=draw)
    if options.get("summary") == "low-rank":
        options["table"] = torch.linalg.qr(torch.randn(g.layers, g.kv_heads, 8, 8, generator=draw))[0].contiguous()
    return Plan(name, model.fingerprint, read=Read(shares, **options), **slots)
