"""Entropy coding: codes of few bits in as many bits as their frequencies ask for, back again bit for bit.

    x ← ⌊x/f⌋·2¹⁴ + c + (x mod f)    writes a code of frequency f/2¹⁴ that codes of frequency c/2¹⁴ stand before
    s: c_s ≤ x mod 2¹⁴ < c_s + f_s,  x ← f·⌊x/2¹⁴⌋ + x mod 2¹⁴ − c    reads it again

Asymmetric numeral systems with static frequencies (Duda, arXiv 1311.2540, the range variant): one number x in
[2³⁰, 2⁶²) for all codes of a tensor, last one first, which gives away or takes up 32 bits at a time. A code of
frequency p costs −log₂ p bits, one that a row always has costs nothing, and a tensor's overhead is the 8 bytes of x.

Frequencies are per row, a channel say, or one table for all rows, whichever takes fewer bytes with its tables. A table
holds weights, round(63·√(count/largest)) but at least 1 for what occurs, and f ∝ weight²: less than 0.01 bits a code
above the entropy. Tables of rows are entropy-coded in turn.

It knows no caches. The loops are compiled by Numba on first use. They are ours so that a file means the same in years
to come: from weight to frequency all is whole numbers, and no library's rounding of probabilities is in the format.

Shapes: R rows, N codes of each, A codes that may occur.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvtool.errors import InputError
from kvtool.records import Record

BITS = 14  # of a frequency
LOW, WORD = 30, 32  # bits of the least state, and of what it gives away
WEIGHTS = 64


@dataclass(frozen=True)
class Stream(Record):
    """`rows` × `count` codes. words int32, the state first; tables uint8 [rows|1,A], or a stream of that many rows."""

    words: torch.Tensor
    tables: torch.Tensor | Stream
    rows: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.tables.nbytes


def compressed(codes: torch.Tensor) -> Stream:
    """codes uint8 [R,N] → the shorter of two streams, with a table for each row or one for all."""
    rows, count = codes.shape
    counts = _counts(codes)
    tables = _weights(counts)
    whole, shared = _under_one(tables), _weights(counts.sum(0, keepdim=True))
    if _cost(counts, tables) + 8 * whole.nbytes < _cost(counts, shared) + 8 * shared.nbytes:
        return Stream(_written(codes, tables), whole, rows, count)
    return Stream(_written(codes, shared), shared, rows, count)


def _under_one(codes: torch.Tensor) -> Stream:
    """codes uint8 [R,N] → a stream with one table for all rows."""
    table = _weights(_counts(codes).sum(0, keepdim=True))
    return Stream(_written(codes, table), table, *codes.shape)


def restored(stream: Stream) -> torch.Tensor:
    """The codes uint8 [R,N]; raises InputError when the stream is damaged."""
    tables = restored(stream.tables) if isinstance(stream.tables, Stream) else stream.tables
    frequencies = _frequencies(tables)
    out = np.empty((stream.rows, stream.count), dtype=np.uint8)
    words = stream.words.cpu().numpy().view(np.uint32)
    if len(words) < 2 or not _loops()[1](words, out, frequencies, _before(frequencies)):
        raise InputError("codes that cannot be read", got="a damaged stream", remedy="write the file again")
    return torch.from_numpy(out)


def entropy(codes: torch.Tensor) -> float:
    """Bits that uint8 [R,N] need if each row's codes come with the frequencies that they have in it."""
    counts = _counts(codes).double()
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return float(-torch.special.xlogy(counts, share).sum() / np.log(2))


def _counts(codes: torch.Tensor) -> torch.Tensor:
    """int64 [R,A]; A is one more than the largest code."""
    rows, size = len(codes), int(codes.max()) + 1 if codes.numel() else 1
    numbered = codes.long() + size * torch.arange(rows, device=codes.device)[:, None]
    return torch.bincount(numbered.flatten(), minlength=rows * size).reshape(rows, size)


def _weights(counts: torch.Tensor) -> torch.Tensor:
    """uint8 [R,A] of counts int64 [R,A]; a row of nothing but zeros has weight at its first code."""
    top = counts.amax(1, keepdim=True).clamp_min(1)
    weights = ((WEIGHTS - 1) * (counts.double() / top).sqrt()).round().clamp_min(1) * (counts > 0)
    weights[:, 0] += weights.sum(1) == 0
    return weights.to(torch.uint8)


def _frequencies(tables: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """int64 [R,A] that sum to 2^14 in each row, none 0 where the weight is not; whole numbers all the way."""
    squares = tables.cpu().numpy().astype(np.int64) ** 2
    there = squares > 0
    spare = (1 << BITS) - there.sum(1, keepdims=True)
    made = squares * spare // np.maximum(squares.sum(1, keepdims=True), 1) + there
    made[np.arange(len(made)), made.argmax(1)] += (1 << BITS) - made.sum(1)
    return made


def _before(frequencies: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.cumsum(frequencies, axis=1) - frequencies


def _cost(counts: torch.Tensor, tables: torch.Tensor) -> float:
    """Bits of codes that occur so often under these tables."""
    share = torch.from_numpy(_frequencies(tables)).double() / (1 << BITS)
    return float(-torch.special.xlogy(counts.double(), share.expand(counts.shape)).sum() / np.log(2))


def _written(codes: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    frequencies = _frequencies(tables)
    room = np.empty(codes.numel() * BITS // WORD + 4, dtype=np.uint32)
    used = _loops()[0](codes.cpu().contiguous().numpy(), room, frequencies, _before(frequencies))
    return torch.from_numpy(room[:used][::-1].copy().view(np.int32))


@functools.cache
def _loops() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two loops, compiled when there is something to write or read: Numba is slow to import."""
    import numba

    return numba.njit(_write), numba.njit(_read)


def _write(codes, words, frequencies, before):
    """codes uint8 [R,N] → words uint32 in the order in which they are given away; returns how many."""
    state, used, apart = 1 << LOW, 0, len(frequencies) > 1
    for row in range(len(codes) - 1, -1, -1):
        table = row if apart else 0
        for at in range(codes.shape[1] - 1, -1, -1):
            code = codes[row, at]
            frequency = frequencies[table, code]
            if state >= frequency << (LOW - BITS + WORD):
                words[used] = state & 0xFFFFFFFF
                state >>= WORD
                used += 1
            state = (state // frequency << BITS) + state % frequency + before[table, code]
    words[used], words[used + 1] = state & 0xFFFFFFFF, state >> WORD
    return used + 2


def _read(words, codes, frequencies, before):
    """The inverse; returns whether the words ended where they must."""
    state, used, apart = np.int64(words[0]) << WORD | np.int64(words[1]), 2, len(frequencies) > 1
    for row in range(len(codes)):
        table = row if apart else 0
        for at in range(codes.shape[1]):
            slot = state & ((1 << BITS) - 1)
            code, above = 0, frequencies.shape[1]
            while above - code > 1:  # the last code that begins at or before the slot
                middle = (code + above) // 2
                if before[table, middle] <= slot:
                    code = middle
                else:
                    above = middle
            codes[row, at] = code
            state = frequencies[table, code] * (state >> BITS) + slot - before[table, code]
            if state < 1 << LOW:
                if used == len(words):
                    return False
                state = state << WORD | np.int64(words[used])
                used += 1
    return used == len(words) and state == 1 << LOW
