"""Allocate: each KV head's keys and values in the encoding that is worth its bytes, among all that are at hand.

Our own; papers that vary bits or ranks by layer weigh one axis at a time. Candidates, per KV head and side:

    bits      min–max codes, keys per channel and values per token, after or before RoPE    (b + 32/group bits a number)
    rank      a basis from Gram matrices: keys in the metric of queries, values in that of gradients    (16·r/D)
    channels  the most important channels as they are                                                   (16·r/D)
    latent    rank, then codes                                                                ((b + 32/group)·r/D)

and per group of n adjacent layers and side, as in `xkv`, keys before RoPE:

    sharing   a basis of all heads of n layers, C = K·D channels each, from joint Gram matrices, in the metric of what
              an error costs in each head: 16·r/(n·C), or in codes (b + 32/group)·r/(n·C)

Error of a candidate: the KL divergence that it causes if this head alone holds this side so, in nats a token, by the
second order of the network after its attention output (`kvtool/measuring/effects.py`), times a factor for each
candidate that makes the sum over heads what is measured when all of them hold it (`kvtool/measuring/divergence.py`):
errors of quantisation add up over heads, those of low ranks repeat from token to token, and the factor accounts for
that. Bytes: of what a candidate writes, scales included, counted against 16-bit numbers; sinks and recent entries,
which stay raw, are taken off the budget first, at `length` tokens.

    minimise Σ error   such that   Σ bytes ≤ budget:   convex hull of every unit, then greedily by slope
    (`kvtool/measuring/allocation.py`);   the hull of a group of layers that may share: the lower convex envelope of
    {the sum of its heads' hulls} and {keys as one + values as one, one or both shared}

The last line is exact for the Lagrangian of the problem. Both sides of a group are written as one or neither, since a
cache holds them so; as one, a side that is not shared has one encoding in all heads, each with its own tables.

The plan is then compared, on texts that nothing was measured on, with the best uniform pairs that take no more bytes;
the outcome is among the facts, whoever wins. Gram matrices are of the statistics `gram` and `cross-gram`. The
`reservoir` is not used: blocks of 64 tokens have no context to attend to. Layers with a sliding window of their own
stay as they are; runs of the others are cut into groups from their first on. Directions that layers share, as in
`minicache`, are not among the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple

import torch

from kvtool import plan as plans
from kvtool.corpus.base import Sample
from kvtool.errors import InputError, unknown
from kvtool.measuring.divergence import Judge
from kvtool.methods import _candidates as ways
from kvtool.methods import _holding as hold
from kvtool.methods import _weighing as weigh
from kvtool.methods._base import Context, Decision, full_attention
from kvtool.methods._candidates import Candidate
from kvtool.methods._dealing import dealt
from kvtool.methods._holding import SIDES, Candidates, Windows
from kvtool.methods._spans import moments, spans
from kvtool.methods._weighing import Errors, Met
from kvtool.options import at_least, record
from kvtool.plan import Plan
from kvtool.slots import RAW, Store
from kvtool.statistics.cross_gram import REACH

STATISTICS = ("gram", "cross-gram")
MODEL = True
REUSE = "errors"
AXES = ("bits", "rank", "channels", "latent", "sharing")
MEASURED = ("met", "effect", "size", "ratio")
WHAT = ("axes", "bits", "ranks", "latent", "layers", "rope", "group", "sink", "recent", "block")  # errors are of
LEAST = 0.1  # of the bytes: below this nothing in `at` is comparable


@dataclass(frozen=True)
class Options:
    """bytes: share of the bytes of 16-bit keys and values that is held after `length` tokens; 1 leaves all as it is.
    length: tokens at which the raw entries are counted. axes: what may vary: bits, rank, channels, latent, sharing.
    bits: of codes. ranks: of bases and channels, shares of a head's width, or of a layer's. latent: bits of codes of
    low-rank entries, shared ones too if latent is among the axes. layers: how many adjacent layers may share a basis,
    each a multiple of the one before; 1 is the heads of a layer. rope: keys are stored after RoPE, and not shared, or
    each where it costs less (both). unit: what has an encoding where layers share none: a KV head, or a layer's side.
    group: numbers that share a range. sink, recent: first and newest entries that stay raw. block: entries that
    leave the raw window together. samples, tokens, steps: texts that errors are measured on, their length, and the
    tokens decoded after each. draws: answers drawn for the gradients of a text. checked: further texts on which the
    plan is compared. rivals: uniform pairs that it is compared with; 0 is none. errors: take what this earlier plan
    measured, with the same options, instead of measuring."""

    bytes: float = 0.2
    length: int = 4096
    axes: tuple[str, ...] = AXES
    bits: tuple[int, ...] = (1, 2, 3, 4, 8)
    ranks: tuple[float, ...] = (0.25, 0.5, 0.75)
    latent: tuple[int, ...] = (2, 3, 4)
    layers: tuple[int, ...] = (2,)
    rope: Literal["after", "both"] = "both"
    unit: Literal["head", "layer"] = "head"
    group: int = 32
    sink: int = 4
    recent: int = 32
    block: int = 32
    samples: int = 3
    tokens: int = 512
    steps: int = 128
    draws: int = 4
    checked: int = 2
    rivals: int = 6
    errors: str = ""

    def __post_init__(self) -> None:
        at_least(1, self, "length", "samples", "tokens", "steps", "draws", "bits", "latent", "block")
        at_least(0, self, "sink", "recent", "rivals")
        at_least(1 if self.rivals else 0, self, "checked")
        if not self.bytes > 0:
            raise InputError("bad option bytes", got=self.bytes, expected="a share above 0")
        for axis in self.axes:
            if axis not in AXES:
                raise unknown("axis", axis, AXES)
        at_least(1, self, "layers")
        nested = all(after > before and after % before == 0 for before, after in pairwise(self.layers))
        if not (self.layers and nested and self.layers[-1] <= REACH + 1):
            raise InputError(
                "bad option layers", got=self.layers, expected=f"1 to {REACH + 1}, each a multiple of the one before"
            )

    @property
    def windows(self) -> Windows:
        return Windows(self.sink, self.recent, self.block)


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if "sharing" in options.axes else STATISTICS[:1]


def at(budget: float) -> dict[str, Any]:
    return {"bytes": max(LEAST, budget), "length": 1000}


def calibrate(context: Context, options: Options) -> Decision:
    budget, windows = options.windows.bits(options.bytes, options.length), options.windows
    whole = full_attention(context.geometry)
    if budget >= 16 or not bool(whole.any()):
        return Decision(store=Store((), (), torch.full(whole.shape, RAW, dtype=torch.int32)))
    texts = weigh.samples(context, count=options.samples + options.checked, tokens=options.tokens, steps=options.steps)
    measured, checked = texts[: options.samples], texts[options.samples :]
    if options.errors:
        context.resume.update(given(context, options))
    candidates, effect, size = weigh.effects(
        context, measured, windows, lambda met: weighed(context, options, met), options.draws
    )
    ratio = weigh.anchored(context, effect, candidates, measured, windows)
    bits = {side: weigh.bits(context, candidates[side]) for side in SIDES}
    error = {side: effect[side] * ratio[side][:, None, None] for side in SIDES}
    choice, made = dealt(context, candidates, bits, error, ratio, budget, options.unit)
    store, numbers = hold.stored(context, candidates, choice, windows), 2 * int(whole.sum())
    spent = made.spent / numbers
    evidence = {
        **{f"{name}.{side}": tensors[side].float() for name, tensors in
           {"effect": effect, "size": size, "ratio": ratio, "bits": bits}.items() for side in SIDES},
        **{name: context.resume[name] for name in context.resume if name.split(".")[0] == "met"},
        "choice": choice.ways.int(), "first": choice.first,
        "curve": (made.path / torch.tensor([numbers, 1.0], dtype=torch.float64)).float(),
    }  # fmt: skip
    facts: dict[str, Any] = {side: [way.name for way in candidates[side]] for side in SIDES}
    facts |= {"bits": spent, "held": windows.share(spent, options.length), "predicted": made.error}
    if options.rivals:
        pairs = rivals(candidates, bits, error, ratio, budget, options.rivals)
        facts |= _compared(context, candidates, store, pairs, checked, windows)
    return Decision(None, evidence, facts, store)


def given(context: Context, options: Options) -> dict[str, torch.Tensor]:
    """What an earlier plan measured. Raises InputError when it measured nothing, another model, or other encodings."""
    found = plans.read(options.errors)
    if not all(f"met.{name}" in found.evidence for name in Met._fields):
        raise InputError(
            "the plan measured no errors of encodings", got=options.errors, expected="one by this method, as it is now"
        )
    found.check(context.running.fingerprint)
    own = record(options)
    other = [f"{name}={found.options.get(name)}" for name in WHAT if found.options.get(name) != own[name]]
    if other:
        raise InputError(
            "these errors were measured of other encodings",
            got=", ".join(other),
            remedy="give the same options as then",
        )
    return {name: found.evidence[name] for name in found.evidence if name.split(".")[0] in MEASURED}


def weighed(context: Context, options: Options, met: Met) -> Candidates:
    """All that `axes` allow, the cheapest tables first; 16 bits are always among them."""
    g, gram = context.geometry, context.seen["gram"]
    ranks = ways.widths(options.ranks, g.head_dim)
    rotaries = [context.running.rotary(layer) for layer in range(g.layers)]
    key, value = gram["k"], ways.blocks(gram["v"], g.kv_heads)
    found: Candidates = {"keys": [ways.sixteen()], "values": [ways.sixteen()]}
    found["keys"] += _kinds(options, "keys", key, gram["q"], ranks)
    found["values"] += _kinds(options, "values", value, met.values, ranks)
    kinds = [rotary.kind for rotary in rotaries]
    if "sharing" in options.axes:
        found["values"] += _shared(context, options, "v", met.values, kinds)
    if options.rope == "both":
        turned = ways.unturned(gram["q"], rotaries, options.tokens, context.running.device)
        bare = ways.blocks(gram["k_pre"], g.kv_heads)
        found["keys"] += [way.before() for way in _kinds(options, "keys", bare, turned, ranks)]
        if "sharing" in options.axes:
            size = turned.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(turned.dtype).tiny)
            cost = turned * (met.logits / size)[..., None, None]
            found["keys"] += [way.before() for way in _shared(context, options, "k_pre", cost, kinds)]
    return found


def _shared(context: Context, options: Options, side: str, metric: torch.Tensor, kinds: list[Any]) -> list[Candidate]:
    """Bases of groups of layers, and codes in them."""
    found: list[Candidate] = []
    for count in options.layers:
        groups = [tuple(span) for span in spans(context.geometry, count, kinds)]
        made = ways.shared(lambda group: moments(context, side, group), metric.double(), groups, options.ranks)
        found += made
        if "latent" in options.axes:
            found += [ways.latent(base, bits, options.group) for base, bits in product(made, options.latent)]
    return found


def _kinds(
    options: Options, side: ways.Side, gram: torch.Tensor, metric: torch.Tensor, ranks: list[int]
) -> list[Candidate]:
    width, found = gram.shape[-1], []
    if "bits" in options.axes:
        found += [ways.coded(side, bits, options.group, width) for bits in options.bits]
    if "channels" in options.axes:
        found += [ways.channels(gram, metric, count) for count in ranks]
    bases = [ways.low_rank(gram, metric, rank) for rank in ranks if {"rank", "latent"} & set(options.axes)]
    found += bases if "rank" in options.axes else []
    if "latent" in options.axes:
        found += [ways.latent(base, bits, options.group) for base, bits in product(bases, options.latent)]
    return found


class Pair(NamedTuple):
    """One encoding of all keys and one of all values: their numbers, bits a number in the mean, and predicted KL."""

    key: int
    value: int
    bits: float
    error: float


def rivals(candidates: Candidates, size: Errors, error: Errors, ratio: Errors, most: float, count: int) -> list[Pair]:
    """Uniform pairs of at most so many bits a number, the best `count` by prediction."""
    totals = {side: error[side].sum((1, 2)) for side in SIDES}
    known = [(ratio[side] > 0).nonzero().flatten().tolist() for side in SIDES]
    found = [
        Pair(k, v, float(size["keys"][k] + size["values"][v]) / 2, float(totals["keys"][k] + totals["values"][v]))
        for k, v in product(*known)
        if hold.together(candidates["keys"][k], candidates["values"][v])
    ]
    return sorted((pair for pair in found if pair.bits <= most * (1 + 1e-9)), key=lambda pair: pair.error)[:count]


def _compared(
    context: Context, candidates: Candidates, store: Store, pairs: list[Pair], texts: list[Sample], windows: Windows
) -> dict[str, Any]:
    """KL on these texts of the plan and of uniform pairs; best: is the plan's the smallest?"""
    judge = Judge(context.running, texts)
    own = float(judge.divergences(Plan("allocate", context.running.fingerprint, store=store)).mean())
    rows: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs, 1):
        key, value = candidates["keys"][pair.key], candidates["values"][pair.value]
        kl = float(judge.divergences(hold.uniform(context, key, value, windows)).mean())
        rows.append({"keys": key.name, "values": value.name, "bits": pair.bits, "predicted": pair.error, "kl": kl})
        context.progress(number, len(pairs), "uniform pairs")
    return {"kl": own, "uniform": rows, "best": all(own < row["kl"] for row in rows)}
