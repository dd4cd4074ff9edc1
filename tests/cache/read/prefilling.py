"""The definition of what a prompt's queries read, one query and one entry at a time; and the cache's way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Step
from kvtool.cache.read.board import Board
from kvtool.cache.read.sparse import Sparse
from kvtool.rotary import NONE
from kvtool.slots import Prefill

K, G, D, N = 2, 3, 8, 45
BASE: dict[str, Any] = dict(block=8, unit=3, local=3, sink=1, dense=5)
LABELS: dict[str, Any] = dict(cut="labels", above=1.1, apart=2, most=3, window=2)
CASES: dict[str, dict[str, Any]] = {
    "pages": {},
    "groups": dict(heads="group", summary="root-mean"),
    "each": dict(heads="each", sink=0, local=0, dense=0),
    "labels": LABELS | dict(summary="root-mean"),
    "columns": dict(rule="columns"),
    "own-columns": dict(rule="columns", heads="each"),
    "mass": dict(rule="columns", mass=0.5, heads="all"),
    "slash": dict(rule="vertical-slash", heads="group"),
    "own-slash": dict(rule="vertical-slash", heads="each", sink=0),
}
ALONE = ("pages", "groups", "each")  # look at nothing but a block and what stands before it


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the definition: for one row of the batch, which entries each query head's row reads


def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Dense causal attention q [H,T,D], k [K,T,D] → [H,T,T], head by head."""
    logits = torch.stack([q[h] @ k[h // G].T for h in range(len(q))]) / math.sqrt(D)
    return logits.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf")).softmax(-1)


def reads(spec: Prefill, q: torch.Tensor, k: torch.Tensor, count: int) -> list[list[set[int]]]:
    """[H][T] sets, for a prompt fed at once."""
    a = weights(q, k)
    teams = {"all": [range(K * G)], "group": [range(g * G, g * G + G) for g in range(K)],
             "each": [range(h, h + 1) for h in range(K * G)]}[spec.heads]  # fmt: skip
    made: list[list[set[int]]] = [[set() for _ in range(N)] for _ in range(K * G)]
    for team in teams:
        for low in range(0, N, spec.block):
            rows = range(low, min(low + spec.block, N))
            near = max(0, low - spec.local)
            sinks = set(range(min(spec.sink, near)))
            sure = sinks | set(range(near, low))
            rest = [j for j in range(low) if j not in sure]
            picked = PICKS[spec.rule](spec, q, k, a, team, rows, rest, max(0, count - len(sure)))
            for row in rows:
                for head in team:
                    everything = row >= N - spec.dense
                    made[head][row] = set(range(row + 1)) if everything else sure | picked | set(range(low, row + 1))
    return made


def best(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda j: (-scores[j], -j))[:count])


def by_units(spec, q, k, a, team, rows, rest, count) -> set[int]:
    rows = [row for row in rows if row < N - spec.dense]
    if not rows or not rest:
        return set()
    query = torch.stack([q[h][rows].mean(0) for h in team]).mean(0)
    keys = torch.stack([k[h // G] for h in team]).mean(0)
    begins = set(range(0, N, spec.unit)) if spec.cut is None else places(spec, a, rows[0])
    units: list[list[int]] = []
    for j in rest:
        if j in begins or not units:
            units.append([])
        units[-1].append(j)
    score = {}
    for number, unit in enumerate(units):
        score[number] = float(query @ keys[unit].mean(0)) * (len(unit) ** 0.5 if spec.summary == "root-mean" else 1)
    found: set[int] = set()
    for number in sorted(score, key=lambda n: -score[n]):
        found |= set(units[number][::-1][: count - len(found)])
    return found


def places(spec: Prefill, a: torch.Tensor, low: int) -> set[int]:
    """Boundaries by labels, as they stand before `low`."""
    w, mean, ratio = spec.window, a.mean(0), {}
    for b in range(w, low - w + 1):
        past, future = (float(mean[b + w :, side].sum()) for side in (slice(b - w, b), slice(b, b + w)))
        ratio[b] = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    found: list[int] = []
    for b in sorted(ratio, key=lambda b: -ratio[b]):
        if ratio[b] > spec.above and all(abs(b - other) > spec.apart for other in found):
            found.append(b)
    return set(found[: spec.most * low // spec.block])


def by_columns(spec, q, k, a, team, rows, rest, count) -> set[int]:
    probes = range(N - 2, N)  # 5 % of 45, and as many of the others, by the same draw
    others = torch.randperm(N - 2, generator=torch.Generator().manual_seed(spec.seed))[:2].tolist()
    probed = [*others, *probes]
    paid = {j: float(sum(a[h, i, j] for h in team for i in probed)) / len(team) for j in range(N)}
    mean = {j: paid[j] / max(1, sum(i >= j for i in probed)) for j in range(N)}
    listed = set(range(N))
    if spec.mass:
        total, order = sum(paid.values()), sorted(paid, key=lambda j: -paid[j])
        size = next(n for n in range(1, N + 1) if sum(paid[j] for j in order[:n]) >= spec.mass * total)
        listed = best(mean, size)
    return best({j: mean[j] for j in rest if j in listed}, count)


def by_slash(spec, q, k, a, team, rows, rest, count) -> set[int]:
    rows = [row for row in rows if row < N - spec.dense]
    if not rows:
        return set()
    last = range(N - spec.block, N)
    columns = {j: float(sum(a[h, i, j] for h in team for i in last)) for j in rest}
    slash = [float(sum(a[h, i, i - n] for h in team for i in last if i >= n)) for n in range(N)]
    upright = best(columns, count // 2)
    slanted = {j: sum(slash[i - j] for i in range(rows[0], rows[-1] + 1)) for j in rest if j not in upright}
    return upright | best(slanted, count - count // 2)


PICKS: dict[str, Callable[..., set[int]]] = {
    "units": by_units, "columns": by_columns, "vertical-slash": by_slash,
}  # fmt: skip


def masked(spec: Prefill, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
    """Attention under the definition, [H,T,D]."""
    out = torch.empty_like(q)
    for head, lines in enumerate(reads(spec, q, k, count)):
        for row, seen in enumerate(lines):
            at = sorted(seen)
            logits = q[head, row] @ k[head // G][at].T / math.sqrt(D)
            out[head, row] = logits.softmax(0) @ v[head // G][at]
    return out


def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Prefill, lanes: list[list[int]]) -> torch.Tensor:
    """One layer's attention through the cache's own parts."""
    step, held = Step(0, D**-0.5), [Bulk(heads) for heads in lanes]
    chosen = Sparse(spec, 0, None, NONE, Board()).choose((0, 0), held, q, k, step)
    assert chosen is not None
    out = torch.empty_like(q).unflatten(1, (K, G))
    for lane in held:
        part = q.unflatten(1, (K, G))[:, lane.heads].flatten(1, 2)
        own_k, own_v = k[:, lane.heads], v[:, lane.heads]
        made, _ = lane.step(part, own_k, own_v, replace(step, chosen=chosen))
        out[:, lane.heads] = made.unflatten(1, (-1, G))
    return out.flatten(1, 2)
