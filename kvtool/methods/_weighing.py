"""What each of many encodings of each head's keys or values costs in predictions, measured on texts.

    error[c, l, k] = ρ_c · effect of candidate c on KV head k of layer l alone (`measuring/effects.py`), nats a token
    ρ_c = KL(all layers' side held as c, the other in 16 bits) / Σ_{l,k} effect         (`measuring/divergence.py`)

The effects say which layers and heads suffer, and take one pass a text for all candidates; ρ puts right what their
second order leaves out, candidate by candidate, so that the sum is exact for each of them everywhere. A candidate that
writes a group of layers as one changes all of them, and each head has its own part of what that costs.

An interrupted calibration resumes after the effects, or between ratios; one Context measures once, whatever is asked of
it then. Shapes: C candidates, L layers, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.measuring.allocation import Each, Either, Ways, corners
from kvtool.measuring.divergence import Judge
from kvtool.measuring.effects import Side, View, changes, views
from kvtool.methods._base import Context, full_attention
from kvtool.methods._candidates import Candidate, sixteen
from kvtool.methods._holding import SIDES, Candidates, Windows, uniform
from kvtool.methods._prompts import texts

SMALL = 1e-5  # nats: effects below are rounding, and no ratio is taken of them
FAR = 8.0  # ρ lies between 1/FAR and FAR
Errors = dict[Side, torch.Tensor]


def samples(context: Context, *, count: int, tokens: int, steps: int) -> list[Sample]:
    """`count` texts of `tokens` tokens, each with the `steps` that follow, from the half that calibration may see."""
    read = texts(context, samples=count, tokens=tokens + steps)
    return [replace(s, tokens=s.tokens[:tokens], answer=s.tokens[tokens:]) for s in read]


class Met(NamedTuple):
    """What errors meet. values fp32 [L,K,D,D]: E g gᵀ of the attention output's gradients g, by those of values; logits
    fp32 [L,K]: what an error of a logit costs (`View.felt`). 0 where unknown."""

    values: torch.Tensor
    logits: torch.Tensor


def met(context: Context, seen: Sequence[dict[int, View]], windows: Windows) -> Met:
    g = context.geometry
    values = torch.zeros(g.layers, g.kv_heads, g.head_dim, g.head_dim, dtype=torch.float64)
    logits = torch.zeros(g.layers, g.kv_heads, dtype=torch.float64)
    for each in seen:
        for layer, view in each.items():
            rows = view.gradient.double().unflatten(1, (g.kv_heads, -1)).transpose(0, 1).flatten(1, 3)
            values[layer] += (rows.mT @ rows).cpu()
            logits[layer] += view.felt(view.coded(windows.sink, windows.recent, windows.block)).cpu()
    return Met(values.float(), logits.float())


def effects(
    context: Context,
    texts: Sequence[Sample],
    windows: Windows,
    candidates: Callable[[Met], Candidates],
    draws: int,
) -> tuple[Candidates, Errors, Errors]:
    """`candidates` of what errors meet, and each one's (effect, size), fp64 [C,L,K] by side, means over the texts; see
    `View`."""
    kept = context.resume
    if "met.values" in kept:
        made = candidates(known(context))
        effect, size = ({side: kept[f"{name}.{side}"].double() for side in SIDES} for name in ("effect", "size"))
        if any(len(effect[side]) != len(made[side]) for side in SIDES):
            raise InputError("these errors were measured of other encodings", remedy="give the same options as then")
        return made, effect, size
    seen: list[dict[int, View]] = []
    for number, sample in enumerate(texts):
        seen.append(views(context.running, sample, draws=draws, seed=context.seed + number))
        context.progress(number + 1, len(texts), "gradients")
    asked = met(context, seen, windows)
    made, g = candidates(asked), context.geometry
    effect = {side: torch.zeros(len(ways), g.layers, g.kv_heads).double() for side, ways in made.items()}
    size = {side: torch.zeros_like(zero) for side, zero in effect.items()}
    for done, layer in enumerate(seen[0], 1):
        for side, ways in made.items():
            for number, way in enumerate(ways):
                span = way.group(layer)
                if span[0] == layer:
                    _measure(seen, side, way, span, windows, (effect[side][number], size[side][number]))
        context.progress(done, len(seen[0]), "errors of layers")
    context.resume |= {f"met.{name}": tensor for name, tensor in asked._asdict().items()}
    context.resume |= {**_named("effect", effect), **_named("size", size)}
    context.checkpoint(context.resume)
    return made, effect, size


def _measure(
    seen: Sequence[dict[int, View]],
    side: Side,
    way: Candidate,
    span: Sequence[int],
    windows: Windows,
    into: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Add the effect and size of one candidate on these layers, written as one, to fp64 [L,K] each."""
    for each in seen:
        members = [each[layer] for layer in span]
        coded = members[0].coded(windows.sink, windows.recent, windows.block)
        made = changes(members, side, way.of(span[0]), coded)
        for layer, view, change in zip(span, members, made, strict=True):
            into[0][layer] += view.effect(change).cpu() / len(seen)
            into[1][layer] += view.size(change).cpu() / len(seen)


def known(context: Context) -> Met:
    """What was measured before."""
    return Met(*(context.resume[f"met.{name}"] for name in Met._fields))


def _named(name: str, state: Errors) -> dict[str, torch.Tensor]:
    """As a checkpoint holds it."""
    return {f"{name}.{side}": tensor for side, tensor in state.items()}


def anchored(
    context: Context, effect: Errors, candidates: Candidates, texts: Sequence[Sample], windows: Windows
) -> Errors:
    """ρ fp64 [C] of each side; 0 for candidates that no head could want, which are not measured."""
    ratio = {side: context.resume.get(f"ratio.{side}", torch.zeros(len(candidates[side]))).double() for side in SIDES}
    queue = [(side, way) for side in SIDES for way in wanted(context, effect[side], candidates[side])]
    queue = [(side, way) for side, way in queue if not float(ratio[side][way])]
    judge = Judge(context.running, texts)
    for done, (side, way) in enumerate(queue, 1):
        total = float(effect[side][way].sum())
        ratio[side][way] = 1.0
        if total > SMALL:
            pair = (candidates[side][way], sixteen())
            made = uniform(context, *(pair if side == "keys" else pair[::-1]), windows)
            ratio[side][way] = min(FAR, max(1 / FAR, float(judge.divergences(made).mean()) / total))
        context.resume |= _named("ratio", ratio)
        context.checkpoint(context.resume)
        context.progress(done, len(queue), f"{side} in {candidates[side][way].name}")
    return ratio


def wanted(context: Context, effect: torch.Tensor, ways: Sequence[Candidate]) -> list[int]:
    """Candidates on the convex hull of any head; and of any group, where its heads may also choose for themselves."""
    size, found = bits(context, ways), set()
    whole = full_attention(context.geometry)
    apart = torch.tensor([not way.groups for way in ways]).nonzero().flatten()
    heads = {
        (layer, head): Ways((layer, head), size[apart], effect[apart, layer, head])
        for layer, head in whole.nonzero().tolist()
    }
    for unit in heads.values():
        found |= {int(apart[way]) for corner in corners(unit) for way in corner.picks.values()}
    for span in sorted({group for way in ways for group in way.groups}):
        fit = torch.tensor([number for number, way in enumerate(ways) if way.groups and way.fits(span)])
        each = Each(tuple(heads[layer, head] for layer in span for head in range(whole.shape[1])))
        count = len(span) * whole.shape[1]
        one = Ways("one", size[fit] * count, effect[fit][:, list(span)].sum((1, 2)))
        picks = [corner.picks for corner in corners(Either((each, one)))]
        found |= {int(fit[each["one"]]) for each in picks if "one" in each}
    return sorted(found)


def bits(context: Context, ways: Sequence[Candidate]) -> torch.Tensor:
    """fp64 [C], bits a number."""
    g = context.geometry
    return torch.tensor([way.bits(g.kv_heads, g.head_dim) for way in ways], dtype=torch.float64)
