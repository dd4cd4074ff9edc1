"""The definition of `attend_evict`: one token attends, its softmax scores the entries, and the worst of them leaves.

    out, lse   as `attend`
    p_hj = softmax_j((logits_hj + ζ_hj) / τ)                    logits as in `attend`, soft-capped; ζ = 0 without noise
    s_kj = reduce_{h of k} pool_j(p_hj)                         sum, mean or max; the mean of `kernel` places, 0 outside
                                                                (or their `peak`); or the same for all k, by a `mix`
                                                                (`kvtool_kernels/mixing.py`)
    s_kj ← s_kj + decay · before_kj, or max(s_kj, decay · before_kj), for the entries that `before` knows
    s_kj ← mean_k s_kj                                          if heads go `alike`
    g_k  = argmin_{low ≤ j < high} s_kj                         of equal ones the first
    m_k, u_k = max, argmax_{j < S−1} cos(k_j, k_{S−1})          once g_k has left, if what is `nearest` is asked for

Entry g_k leaves: in k and v it goes to the last place, S − 1, and those behind it move up by one, in place. With
low = high nothing leaves. Scores are fp32 at least. With a `past`, queries of the N tokens just before, p_hj is the
mean over those of the N + 1 queries that see j, which each of them does up to its own entry. A mixture goes with heads
that are alike, and with neither noise, heat, pooling nor a past. A twin may take p below e^−87 for 0: of entries that
are paid no more, another may leave.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend.reference import attend
from kvtool_kernels.attend.reference import logits as logits_of
from kvtool_kernels.merge.reference import Partial
from kvtool_kernels.mixing import mixed
from kvtool_kernels.precision import wide
from kvtool_kernels.scoring import SOFTMAX, Scoring

LEAST = 1e-12  # length of a key
Near = tuple[torch.Tensor, torch.Tensor]
Evicted = tuple[Partial, torch.Tensor, torch.Tensor | None, Near | None]


def attend_evict(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: torch.Tensor | None,
    *,
    scale: float,
    free: tuple[int, int],
    softcap: float | None = None,
    scoring: Scoring = SOFTMAX,
    nearest: bool = False,
) -> Evicted:
    """q [B,H,1,D], k and v [B,K,S,D], the newest entry last; before [B,K,N], N ≤ S; free (low, high) as above →
    (out [B,H,1,D], lse [B,H,1]), the scores [B,K,S−1] of those that stay (all S, if none leaves), g int64 [B,K,1] (or
    None), and (m, u int64), each [B,K,1] (or None)."""
    made = attend(q, k, v, scale=scale, softcap=softcap)
    seen = logits_of(q, k, scale=scale, softcap=softcap)
    return evicted(
        made, seen, q, k, v, before, scale=scale, softcap=softcap, free=free, scoring=scoring, nearest=nearest
    )


def evicted(
    made: Partial, seen: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor | None,
    *, scale: float, softcap: float | None, free: tuple[int, int], scoring: Scoring, nearest: bool,
) -> Evicted:  # fmt: skip
    """What comes after attention, which has given `made` and the logits `seen` [B,H,1,S]."""
    mix, past, blend = scoring.mix, scoring.past, None
    if mix is not None:
        blend = mixed(mix, torch.softmax(seen, -1)[:, :, 0], seen[:, :, 0], q, v, made[0], scale=scale, softcap=softcap)
    earlier = None if past is None else _causal(logits_of(past, k, scale=scale, softcap=softcap))
    scores = scored(seen, before, k.shape[1], scoring, blend=blend, earlier=earlier)
    if free[0] == free[1]:
        return made, scores, None, None
    gone = free[0] + scores[:, :, free[0] : free[1]].argmin(-1, keepdim=True)
    places = torch.arange(k.shape[2] - 1, device=gone.device)
    index = places + (places >= gone)
    order = torch.cat([index, gone], -1)[..., None]
    for x in (k, v):
        x.copy_(x.gather(2, order.expand(-1, -1, -1, x.shape[-1])))
    return made, scores.gather(2, index), gone, most_like_the_last(k) if nearest else None


def most_like_the_last(k: torch.Tensor) -> Near:
    """m and u of the keys k [B,K,S,D]."""
    keys = wide(k)
    size = keys.norm(dim=-1).clamp_min(LEAST)
    likeness = (keys[:, :, :-1] @ keys[:, :, -1:].mT)[..., 0] / size[..., :-1]
    best, place = likeness.max(-1, keepdim=True)
    return best / size[..., -1:], place


def scored(
    seen: torch.Tensor, before: torch.Tensor | None, kv_heads: int, scoring: Scoring, *,
    blend: torch.Tensor | None = None, earlier: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Logits [B,H,1,S], and of the past [B,H,N,S], or what is made of them, `blend` [B,1,S] → the scores [B,K,S] of all
    entries."""
    scores = _paid(seen, earlier, kv_heads, scoring) if blend is None else blend.repeat(1, kv_heads, 1)
    if before is not None:
        known, old = scores[:, :, : before.shape[2]], scoring.decay * before
        known.copy_(torch.maximum(known, old) if scoring.largest else known + old)
    return scores.mean(1, keepdim=True).expand_as(scores).contiguous() if scoring.alike else scores


def _paid(seen: torch.Tensor, earlier: torch.Tensor | None, kv_heads: int, scoring: Scoring) -> torch.Tensor:
    """What the queries pay, [B,K,S]."""
    if scoring.noise:
        seen = seen + torch.cat([*scoring.noise]).to(seen)[:, None]
    paid = torch.softmax(seen / scoring.heat, -1)[:, :, 0]
    if earlier is not None:
        entries = torch.arange(paid.shape[-1], 0, -1, device=paid.device)  # from each to the newest
        paid = (paid + torch.softmax(earlier / scoring.heat, -1).sum(2)) / entries.clamp_max(1 + earlier.shape[2])
    each = paid.unflatten(1, (kv_heads, -1))
    if scoring.kernel > 1:
        pool = torch.nn.functional.max_pool1d if scoring.peak else torch.nn.functional.avg_pool1d
        each = pool(each.flatten(1, 2), scoring.kernel, 1, scoring.kernel // 2).view_as(each)
    return each.amax(2) if scoring.group == "max" else each.mean(2) if scoring.group == "mean" else each.sum(2)


def _causal(logits: torch.Tensor) -> torch.Tensor:
    """[B,H,N,S] of queries whose entries stand just before the newest; −inf where they see nothing."""
    count, entries = logits.shape[2:]
    hidden = torch.ones(count, entries, dtype=torch.bool, device=logits.device).triu(entries - count)
    return logits.masked_fill(hidden, float("-inf"))
