"""MiniCache: two adjacent layers of the deeper half share one direction a token, and keep their own lengths.

Liu et al., arXiv 2405.14366, NeurIPS 2024.

    pairs (l − 1, l) for l > S, S = L/2;   per token and KV head: u = x/‖x‖, Ω = arccos(u¹·u²)
    e = (sin((1 − t)Ω)·u¹ + sin(tΩ)·u²) / sin Ω,   x̂ⁱ = ‖xⁱ‖·e
    the tokens that are least alike stay as they are

    memory of a merged pair: (b + 16·2/D) / 2 bits a number, b those of the direction; b = 4 leaves all layers in 4 bits

The authors released no code; the abstract and xKV's reimplementation were read, and S, t = 0.6 and the share 0.05 of
retained tokens are from memory of the paper. Departures: tokens are retained by rank within each block, so that the
capacity is fixed, where the paper cuts at a share of the range of angles; and per KV head. xKV's reimplementation
keeps the most similar tokens instead, by a mask the wrong way round, and with its default all of them; not here. New
entries wait in the raw window until both layers have written them. In mode=calibrated, which is ours, the pairs are
those that cost least, without overlap, keys and values apart, as many as the published ones; t is each pair's best. A
cost is the error of the direction, or 1 − cosine, or what merging this pair alone does to predictions: the divergence
sees that some layers' errors matter less than others', which an error does not.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine, Codec, Raw, Slerp
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.measuring.divergence import Judge
from kvtool.methods._base import Context, Decision, full_attention, share
from kvtool.methods._holding import SIDES
from kvtool.methods._pairs import Choice, cheapest, deepest
from kvtool.methods._weighing import samples
from kvtool.options import at_least
from kvtool.plan import Plan
from kvtool.slots import RAW, Store
from kvtool.statistics.slerp import PLACES

STATISTICS = ("neighbours", "slerp")
MODEL = False
AXES: tuple[Literal["token", "channel"], ...] = ("token", "channel")  # of the codes of keys, of values


@dataclass(frozen=True)
class Options:
    """mode: published, which merges the deepest layers pair by pair, or calibrated, which merges those that measured
    best. merged: share of the layers that are merged. t: where the direction lies between the two layers', in published
    mode. by: what calibrated pairs are chosen by: error or cosine of directions, or divergence of predictions. retain:
    share of the tokens that stays as it is. bits: of directions, and of layers that are not merged; 16 leaves those as
    they are. group: numbers that share a range. recent: newest entries that stay raw. block: entries that leave the raw
    window together, and among which the retained are chosen. sink: first entries that stay raw. samples, tokens, steps:
    texts that divergence is measured on, their length, and the tokens decoded after each."""

    mode: Literal["published", "calibrated"] = "published"
    merged: float = 0.5
    t: float = 0.6
    by: Literal["error", "cosine", "divergence"] = "error"
    retain: float = 0.05
    bits: int = 16
    group: int = 32
    recent: int = 32
    block: int = 64
    sink: int = 0
    samples: int = 2
    tokens: int = 512
    steps: int = 32

    def __post_init__(self) -> None:
        at_least(0, self, "recent", "sink")
        at_least(1, self, "block", "group", "samples", "tokens", "steps")
        share(self.merged, "merged")
        if not (1 <= self.bits <= 8 or self.bits == 16):
            raise InputError("bad option bits", got=self.bits, expected="1 to 8, or 16")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """Merged layers first, then codes: half of the layers in b + 1 of 16 bits, half in half of that, and what stays."""
    if budget >= 0.5:
        return {"merged": min(1.0, (1 - budget) / 0.43)}
    return {"bits": max(1, min(8, int(16 * (budget - 0.04) / 0.75 - 1)))}


def calibrate(context: Context, options: Options) -> Decision:
    g, evidence = context.geometry, {}
    whole = full_attention(g)[:, 0]
    possible = whole[1:] & whole[:-1]
    chosen = deepest(g.layers, g.layers - round(options.merged * g.layers), possible)
    arcs = torch.full((len(possible), 2), options.t, dtype=torch.float64)
    if options.mode == "calibrated":
        error, cosine, arcs = measured(context)
        evidence = {"error": error, "cosine": cosine, "t": arcs}
        costs = error if options.by == "error" else 1 - cosine
        if options.by == "divergence":
            costs = evidence["divergence"] = divergences(context, possible, arcs, options)
        chosen = cheapest(torch.where(possible[:, None], costs, torch.inf), 2 * len(chosen))
    facts = {"pairs": [[first, first + 1, *("kv"[side] for side in sides)] for first, sides in chosen.items()]}
    return Decision(store=_store(g.layers, g.kv_heads, chosen, arcs, options), evidence=evidence, facts=facts)


def measured(context: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each pair of adjacent layers, keys and values, [L−1,2] each: the error of the best direction relative to the
    energy, the mean cosine, and the place of that direction on the arc."""
    slerp, near = context.seen["slerp"], context.seen["neighbours"]
    errors = torch.stack([slerp[side].sum(1) for side in "kv"], dim=1)  # [L−1,2,places]
    energy = torch.stack([slerp[f"{side}_energy"].sum(1) for side in "kv"], dim=1)
    cosine = torch.stack([near[side].mean(1) for side in "kv"], dim=1) / near["tokens"].clamp_min(1)
    best = errors.min(-1)
    relative = best.values / torch.where(energy == 0, 1.0, energy)
    return relative.float(), cosine.float(), PLACES[best.indices]


def divergences(context: Context, possible: torch.Tensor, arcs: torch.Tensor, options: Options) -> torch.Tensor:
    """fp32 [L−1,2]: KL of predictions, nats a token, with one pair of layers merged, its keys or its values, and
    everything else as it is; 0 where no pair is possible. Resumable."""
    model, g = context.running, context.geometry
    alone, pairs = replace(options, bits=16), possible.nonzero().flatten().tolist()
    found = context.resume.get("divergence", torch.full((g.layers - 1, 2), torch.nan))
    judge = Judge(model, samples(context, count=options.samples, tokens=options.tokens, steps=options.steps))
    for done, (pair, side) in enumerate(itertools.product(pairs, range(2)), 1):
        if found[pair, side].isnan():
            store = _store(g.layers, g.kv_heads, {pair: (side,)}, arcs, alone)
            found[pair, side] = judge.divergences(Plan("minicache", model.fingerprint, store=store)).mean()
            context.checkpoint({"divergence": found})
        context.progress(done, 2 * len(pairs), f"layers {pair} and {pair + 1}, {SIDES[side]}")
    return found.nan_to_num()


def _store(layers: int, heads: int, chosen: Choice, arcs: torch.Tensor, options: Options) -> Store:
    plain: list[Codec] = [Raw(), Raw()]
    inner: list[Codec] = [Raw("float16"), Raw("float16")]
    if options.bits < 16:
        plain = inner = [Affine(options.bits, options.group, axis) for axis in AXES]
    pairs = [[Encoding(codec) for codec in plain]]
    index = torch.full((layers, heads), RAW if options.bits == 16 else 0, dtype=torch.int32)
    first = torch.arange(layers, dtype=torch.int32)
    for pair, sides in chosen.items():
        index[pair : pair + 2], first[pair + 1] = len(pairs), pair
        merged = [Slerp(round(float(arcs[pair, n]), 4), options.retain, options.block, inner[n]) for n in (0, 1)]
        pairs.append([Encoding(merged[side] if side in sides else plain[side]) for side in (0, 1)])
    keys, values = zip(*pairs, strict=True)
    return Store(tuple(keys), tuple(values), index, options.sink, options.recent, options.block, first)
