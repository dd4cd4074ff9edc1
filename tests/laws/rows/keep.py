"""Methods that decide which entries stay."""

from __future__ import annotations

from tests.laws.rows._base import BRIEF, CALIBRATED, Options, Row

DUO: Options = dict(steps=3, lengths=(160,), passkeys=1)
RLKV: Options = dict(steps=2, tasks=("repeat",), lengths=(40,), problems=2, batch=2, samples=4, temperature=1.0)
LOCRET: Options = dict(steps=3, lengths=(120,), prompts=1, kinds=("text",), hidden=4, sink=0, recent=1)
LOCOCO: Options = dict(
    steps=3, lengths=(120,), prompts=1, kinds=("text",), slots=4, kernel=3, window=3, recent=2, trained=(0.2, 0.5)
)  # fmt: skip
SPANS: Options = dict(opening=tuple("!\"#$%&'()*+-./"), closing=tuple("0123456789:;<=>?@ABCDEFGHIJKLMNOPQRS"))  # often
MARKED: Options = dict(open=tuple("!\"#$%&'()*+-./01234567"), close=tuple("89:;<=>?"))  # enough for spans in random ids
ROWS = {
    "streaming": Row(
        tiny=(dict(sink=2, recent=5), dict(sink=0, recent=3), dict(sink=1, recent=6, position="original")),
        lossless=(dict(recent=900), dict(recent=900, position="original")),
        ladder=tuple(dict(sink=1, recent=recent, position="original") for recent in (2, 12, 30, 200)),
    ),
    "razor": Row(
        tiny=(dict(induction=0.3, echo=0.2, sink=2, recent=5, recent_ratio=0.0),),
        lossless=(dict(induction=1.0), dict(induction=0.0, recent=900)),
        ladder=tuple(
            dict(induction=share, echo=0.0, sink=1, recent=4, recent_ratio=0.0, compensate=False)
            for share in (0.0, 0.125, 0.5, 1.0)
        ),
    ),
    "snapkv": Row(
        tiny=(dict(budget=0.4, window=3, kernel=3), dict(budget=9, window=2, kernel=1, pool="none", sink=1)),
        lossless=(dict(budget=1.0),),
        ladder=tuple(dict(budget=share, window=2, kernel=3) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "adakv": Row(
        tiny=(
            dict(budget=0.4, window=3, kernel=3),
            dict(budget=0.3, window=2, kernel=1, floor=0.0, group="max"),
            dict(budget=0.4, window=3, kernel=3, mode="calibrated", samples=1, tokens=40),
        ),
        lossless=(dict(budget=1.0),),
        ladder=tuple(dict(budget=share, window=2, kernel=3) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "pyramidkv": Row(
        tiny=(dict(budget=0.4, window=3, kernel=3, beta=4), CALIBRATED | dict(budget=0.4, window=3, steps=2)),
        lossless=(dict(budget=1.0), dict(budget=1.0, mode="calibrated")),
        ladder=tuple(dict(budget=share, window=2, kernel=3, beta=2) for share in (0.1, 0.3, 0.6, 1.0)),
    ),
    "h2o": Row(
        tiny=(dict(heavy=0.2, recent=0.2), dict(heavy=4, recent=3, position="reindex", bulk=3)),
        lossless=(dict(heavy=450, recent=450),),
        ladder=tuple(dict(heavy=count, recent=count) for count in (1, 4, 12, 450)),
    ),
    "keyformer": Row(
        tiny=(dict(keep=0.4), dict(keep=9, steps=8, mode="code")),
        lossless=(dict(keep=900),),
        ladder=tuple(dict(keep=count) for count in (2, 8, 24, 900)),
    ),
    "scissorhands": Row(
        tiny=(
            dict(budget=0.5, history=3, recent=3, drop=0.3),
            dict(budget=0.5, history=3, recent=3, mode="calibrated", floor=0.3),
        ),
        lossless=(dict(budget=900),),
        ladder=tuple(dict(budget=count, history=2, recent=2, drop=0.25) for count in (4, 10, 30, 900)),
    ),
    "tova": Row(
        tiny=(dict(budget=0.4),),
        lossless=(dict(budget=900),),
        ladder=tuple(dict(budget=count) for count in (2, 8, 24, 900)),
    ),
    "keydiff": Row(
        tiny=(dict(budget=0.4, recent=2), dict(budget=9, when="step", sink=1), dict(budget=9, when="chunk")),
        lossless=(dict(budget=1.0), dict(budget=900, when="step")),
        ladder=tuple(dict(budget=share, recent=1) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "kvcrush": Row(
        tiny=(dict(budget=0.4, window=3, kernel=3), dict(budget=9, window=2, anchor="mean", spacing="step")),
        lossless=(dict(budget=1.0),),
        ladder=tuple(dict(budget=share, window=2, kernel=3) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "critic": Row(
        tiny=(dict(ratio=0.6, minimum=4), dict(ratio=0.5, alpha=1.0, pressure=0.2, minimum=4, position="reindex")),
        lossless=(dict(minimum=900),),
        ladder=tuple(dict(ratio=0.9, minimum=count) for count in (4, 10, 30, 900)),
    ),
    "d2o": Row(
        tiny=(
            dict(hh=0.2, recent=0.2, sink=1, whole=False, **BRIEF),
            dict(hh=0.3, recent=0.1, whole=False, mode="calibrated", count=True, **BRIEF),
        ),
        lossless=(dict(hh=0.5, recent=0.5),),
        ladder=tuple(dict(hh=share / 2, recent=share / 2, sink=1, whole=False) for share in (0.1, 0.3, 0.6, 1.0)),
    ),
    "elastic": Row(
        tiny=(dict(budget=0.4, sink=2, distance=4), dict(budget=0.5, sink=1, distance=3, mode="code")),
        lossless=(dict(budget=1.0),),
        ladder=tuple(dict(budget=share, sink=1, distance=4) for share in (0.1, 0.3, 0.6, 1.0)),
    ),
    "ems": Row(
        tiny=(dict(budget=0.4, window=3, threshold=-1.0), dict(budget=9, window=2, sink=1, candidates=0.5, count=True)),
        lossless=(dict(budget=1.0),),
        ladder=tuple(dict(budget=share, window=2) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "kvmerger": Row(
        tiny=(
            dict(budget=0.4, sink=1, recent=3, heavy=0.3),
            dict(budget=0.5, sink=0, recent=2, mode="calibrated", level="head", count=True, **BRIEF),
        ),
        lossless=(dict(budget=1.0),),
        ladder=tuple(dict(budget=share, sink=1, recent=2) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "lookm": Row(
        tiny=tuple(MARKED | dict(heavy=0.2, recent=0.1, merge=merge) for merge in ("avg", "pivot")),
        lossless=(MARKED | dict(heavy=0.5, recent=0.5), {}),
        ladder=tuple(MARKED | dict(heavy=share / 2, recent=share / 2) for share in (0.05, 0.3, 0.6, 1.0)),
    ),
    "locret": Row(
        tiny=(LOCRET | dict(budget=0.4, recent=3), LOCRET | dict(budget=9, position="reindex", sink=1)),
        lossless=(LOCRET | dict(budget=1.0),),
        ladder=tuple(LOCRET | dict(budget=share) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "lococo": Row(
        tiny=(LOCOCO | dict(budget=0.5), LOCOCO | dict(budget=12, pool=3, when="step", buffer=3)),
        lossless=(LOCOCO | dict(budget=1.0),),
        ladder=tuple(LOCOCO | dict(budget=share) for share in (0.1, 0.3, 0.6, 1.0)),
    ),
    "cake": Row(
        tiny=(
            dict(budget=0.4, window=3, kernel=3),
            dict(budget=8, window=2, kernel=1, gamma=0, decode="append"),
            CALIBRATED | dict(budget=0.4, window=3, tau1=1.6, tau2=0.8),
        ),
        lossless=(dict(budget=900), dict(budget=1.0, decode="append")),
        ladder=(*(dict(budget=share, window=2, kernel=3) for share in (0.05, 0.2, 0.5)), dict(budget=200)),
    ),
    "compresskv": Row(
        tiny=(
            dict(samples=2, tokens=240, budget=0.4, heads=2, window=3, kernel=3, floor=8, probe=16, steps=2),
            dict(budget=9, heads=1, window=2, layers="equal"),
        ),
        lossless=(dict(budget=1.0),),
        ladder=tuple(dict(budget=b, heads=1, window=2, kernel=3, layers="equal") for b in (0.05, 0.2, 0.5, 1.0)),
    ),
    "prefixkv": Row(
        tiny=(
            CALIBRATED | dict(budget=0.4, distance=4),
            dict(budget=0.4, sink=2, distance=6, mode="prompt"),
            dict(budget=8, sink=1, decode="append", mode="prompt"),
        ),
        lossless=(dict(budget=1.0, mode="prompt"), dict(budget=900, mode="prompt", decode="append")),
        ladder=tuple(dict(budget=share, sink=1, mode="prompt") for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "uncomp": Row(
        tiny=(
            dict(budget=0.4, window=3, kernel=3),
            dict(budget=9, low=0.6, groups=3, window=2, decode="append"),
            dict(budget=0.3, stages=True, fall=0.01, window=2, kernel=1),
        ),
        lossless=(dict(budget=1.0, decode="append"), dict(budget=900)),
        ladder=(*(dict(budget=share, window=2, kernel=3) for share in (0.05, 0.2, 0.5)), dict(budget=900)),
    ),
    "zipvl": Row(
        tiny=(
            dict(tau=0.6),
            dict(budget=0.4, observe="all"),
            CALIBRATED | dict(tau=0.7),
            dict(tau=0.6, prefill="sparse", block=4, local=1),
        ),
        lossless=(dict(tau=1.0),),
        ladder=tuple(dict(tau=tau) for tau in (0.05, 0.3, 0.7, 1.0)),
    ),
    "kvzip": Row(
        tiny=(
            dict(budget=0.4, sink=1, chunk=9),
            dict(budget=0.4, spread="head", chunk=50, score="value-attention", opening=""),
            dict(mode="heads", full=0.3, sink=1, recent=5, **BRIEF),
        ),
        lossless=(dict(budget=1.0, chunk=16), dict(mode="heads", full=1.0, **BRIEF)),
        ladder=tuple(dict(budget=share, sink=0, spread="head") for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "expected-attention": Row(
        tiny=(
            dict(budget=0.4, sink=1, future=6),
            dict(budget=0.4, sink=2, future=40, mode="prompt", spread="layer"),
            dict(budget=9, covariance=False, norm=False, future=1),
        ),
        lossless=(dict(budget=1.0), dict(budget=1.0, mode="prompt")),
        ladder=tuple(dict(budget=share, mode="prompt", sink=0, future=24) for share in (0.05, 0.2, 0.5, 1.0)),
    ),
    "span-rule": Row(
        tiny=(SPANS | dict(buffer=1), SPANS | dict(buffer=0, markers=True, position="reindex")),
        lossless=({}, SPANS | dict(buffer=900)),
        ladder=tuple(SPANS | dict(buffer=count) for count in (0, 2, 5, 900)),
    ),
    "mpcache": Row(
        tiny=(
            dict(budget=0.4, part="static", **BRIEF),
            dict(budget=0.7, cap=0.5, code=True, upper=4, lower=2, second=0.4, sink=2, **BRIEF),
            dict(part="dynamic", upper=6, lower=2, first=0.3, second=0.3, alpha=0.2, heads="each", sink=1),
        ),
        lossless=(
            dict(mode="fixed", threshold=0.0, first=1.0, second=1.0),
            dict(part="dynamic", upper=4, lower=1, second=1.0, share=2),
        ),
        ladder=tuple(
            dict(mode="fixed", threshold=0.0, upper=4, lower=2, first=share, second=share, sink=0, cap=share)
            for share in (0.05, 0.2, 0.5, 1.0)
        ),
    ),
    "rlkv": Row(
        tiny=(RLKV | dict(full=0.4, sink=2, recent=5, solved=False),),
        lossless=(RLKV | dict(full=1.0, solved=False), RLKV | dict(full=0.0, recent=900, solved=False)),
        ladder=tuple(RLKV | dict(full=share, sink=1, recent=4, lr=0.2, steps=6) for share in (0.0, 0.125, 0.5, 1.0)),
    ),
    "retrieval-heads": Row(
        tiny=(
            dict(full=0.4, sink=2, recent=5, answered=0),
            dict(full=0.3, recent=4, answered=0, mode="code", reduce="mean"),
        ),
        lossless=(dict(full=1.0, answered=0), dict(full=0.0, recent=900, answered=0)),
        ladder=tuple(dict(full=share, sink=1, recent=4) for share in (0.0, 0.125, 0.5, 1.0)),
    ),
    "llm-drop": Row(
        tiny=(dict(drop=1), dict(drop=0.7)),
        lossless=(dict(drop=0),),
        ladder=(dict(drop=2), dict(drop=1), dict(drop=0)),
    ),
    "duo": Row(
        tiny=(DUO | dict(full=0.4, sink=2, recent=5),),
        lossless=(DUO | dict(full=1.0), DUO | dict(full=0.0, recent=900)),
        ladder=tuple(DUO | dict(full=share, sink=1, recent=4, lr=0.2, steps=6) for share in (0.0, 0.125, 0.5, 1.0)),
    ),
}
