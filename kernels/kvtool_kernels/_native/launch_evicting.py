"""From tensors to a job of `evicting.py`, and back."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from kvtool_kernels._native import evicting, mixing, team
from kvtool_kernels._native.record import AT_ONCE, LANES, numbers, padded
from kvtool_kernels._native.scoring import FIELDS, MAX, MEAN, SUM
from kvtool_kernels.attend_evict.reference import Evicted
from kvtool_kernels.scoring import Scoring

CHUNK = 128  # entries of a chunk at least, where a head is divided among threads
SHARES = 2  # chunks per thread, so that none waits long for the last
HOW = {"sum": SUM, "mean": MEAN, "max": MAX}


def attend_evict(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: torch.Tensor | None,
    *,
    scale: float,
    free: tuple[int, int],
    scoring: Scoring,
    nearest: bool,
) -> Evicted:
    """As `attend_evict/reference.py`, for fp32 whose channels are whole vectors and neighbours in memory; up to LANES
    heads a group, and no noise with a past; with a mixture of scores, heads are alike."""
    mix, past, noise = scoring.mix, scoring.past, scoring.noise
    batch, heads, _, width = q.shape
    kv_heads, entries = k.shape[1], k.shape[2]
    own, rows = heads // kv_heads, batch * kv_heads
    chunks, threads = _chunks(rows, entries)
    pitch, pad = padded(entries), padded(scoring.kernel // 2)
    stay = entries - (free[0] < free[1])
    scratch = max(AT_ONCE * evicting.TILE, width, (1 + AT_ONCE) * pitch + 2 * pad)
    if mix is not None:
        scratch = max(scratch, own * (width + LANES) + AT_ONCE * mixing.TILE)
    sizes = [
        rows * chunks * (LANES + own * (LANES + width)), threads * scratch, rows * own * pitch, rows * pitch, rows,
        0 if mix is None else rows * pitch,
    ]  # fmt: skip
    work = numbers(sum(sizes))
    parts, room, logits, scores, entropies, changes = (
        work.data_ptr() + 4 * at for at in itertools.accumulate([0, *sizes[:-1]])
    )
    gone, near = numbers(batch, kv_heads, 1), numbers(batch, kv_heads, 1, 2) if nearest else None
    out, lse = numbers(batch, heads, 1, width), numbers(batch, heads, 1)
    after, query = numbers(batch, kv_heads, stay), (q * scale).contiguous()
    job = np.zeros(FIELDS + kv_heads + rows + batch, dtype=np.int64)  # behind it: noise, then what is done
    noises, done = (job.ctypes.data + 8 * at for at in (FIELDS, FIELDS + kv_heads))
    mixture, kept = (0,) * 7, None
    if mix is not None:
        kept = None if mix.before is None else mix.before.float().contiguous()
        many = heads * max(math.log(entries), 1e-30)
        mixture = (
            1, 0 if kept is None else kept.data_ptr(), changes, entropies,
            _bits(mix.attention), _bits(mix.gradient), _bits(mix.entropy / many),
        )  # fmt: skip
    asked = None if past is None else (past * scale).contiguous()
    known = (0, 0, 0, 0) if before is None else (before.data_ptr(), before.shape[2], before.stride(0), before.stride(1))
    job[:FIELDS] = [
        0, 0, rows * chunks, room, 4 * scratch, kv_heads, own, chunks, entries, width, pitch, pad,
        query.data_ptr(), k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3],
        out.data_ptr(), lse.data_ptr(), parts, logits, scores,
        *known, after.data_ptr(), gone.data_ptr(), 0 if near is None else near.data_ptr(), *free,
        *((noises, noise[0].stride(0)) if noise else (0, 0)), _bits(1 / scoring.heat), bool(noise) or scoring.heat != 1,
        HOW[scoring.group], scoring.kernel, _bits(scoring.decay), scoring.largest, scoring.alike,
        done, done + 8 * rows, *mixture, scoring.peak,
        *((0, 0) if asked is None else (asked.data_ptr(), asked.shape[2])),
    ]  # fmt: skip
    if noise:
        job[FIELDS : FIELDS + kv_heads] = [x.data_ptr() for x in noise]
    team.run(evicting.function(), job, threads)
    found = None if near is None else (near[..., 0], near[..., 1].long())
    return (out, lse), after, *((None, None) if stay == entries else (gone.long(), found))


def _chunks(rows: int, entries: int) -> tuple[int, int]:
    """Into how many chunks each of so many heads is cut, and how many threads take them."""
    threads = torch.get_num_threads()
    if threads == 1 or rows % threads == 0:
        return 1, min(threads, rows)
    chunks = max(1, min(-(-SHARES * threads // rows), entries // CHUNK))
    return chunks, min(threads, rows * chunks)


def _bits(number: float) -> int:
    """fp32 as the int64 field that holds it."""
    return int(np.float32(number).view(np.int32))
