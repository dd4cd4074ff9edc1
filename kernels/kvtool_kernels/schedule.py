"""How the entries of many heads are dealt out to workers: equal numbers of tiles, wherever one head ends.

    total tiles W = Σ_h ⌈S_h / tile⌉,  most = ⌈W / workers⌉
    the first W − (most − 1)·workers workers take `most` consecutive tiles, the others one fewer

A worker's run of tiles is cut where a head ends. Each piece gives a partial result (out, log-sum-exp), and the pieces
of a head are merged, so that the result does not depend on the number of workers. Heads may hold any numbers of
entries: the makespan is `most` tiles, where a split of each head by itself waits for the last of the longest head.

LeanAttention (Sanovar et al., arXiv 2405.10480): this is its stream-K deal. There the worker that begins a head waits
for the others and merges what they have left; here whoever is last to finish a piece of a head merges its pieces, so
that nobody waits, and no two workers need to run at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

WORKER, HEAD, FIRST, LAST, SPLIT, SPLITS = range(6)  # columns of a deal


def stream_k(tiles: Sequence[int], workers: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """tiles: of each head. → int64 [P,6], in the order of tiles: the worker, the head, the first of the head's tiles
    and the one behind the last, the number of the piece among the head's, and how many these are."""
    heads = np.concatenate([[0], np.cumsum(tiles, dtype=np.int64)])
    total = int(heads[-1])
    most = -(-total // workers)
    many = total - (most - 1) * workers
    numbers = np.arange(workers + 1)
    ends = np.minimum(numbers, many) * most + np.maximum(numbers - many, 0) * (most - 1)
    cuts = np.unique(np.concatenate([heads, ends]))
    low, high = cuts[:-1], cuts[1:]
    worker, head = np.searchsorted(ends, low, side="right") - 1, np.searchsorted(heads, low, side="right") - 1
    first = np.searchsorted(head, head)  # the first piece of each one's head
    splits = np.searchsorted(head, head, side="right") - first
    return np.stack([worker, head, low - heads[head], high - heads[head], np.arange(len(head)) - first, splits], axis=1)
