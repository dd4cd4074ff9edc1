"""Entries that leave one at a time: those behind them move up within the buffer, which is not copied.

On a CPU one `memmove` per head and gap moves what stands behind it; on other devices, or where much leaves at once, a
copy of what stays is the quicker way, and frees memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

FEW = 16  # entries; where more leave, or more room would be left, what stays is copied


def closes(buffers: tuple[torch.Tensor, ...], index: torch.Tensor, held: int) -> bool:
    """May the buffers [B,K,R,D] be closed up, so that of `held` entries those at index int64 [B,K,N] remain?"""
    few = held > index.shape[2] and buffers[0].shape[2] - index.shape[2] <= FEW
    return few and all(x.device.type == "cpu" and x.is_contiguous() and not x.requires_grad for x in buffers)


def close_up(buffers: tuple[torch.Tensor, ...], index: torch.Tensor, held: int) -> None:
    """Move the entries at index int64 [B,K,N], in order, to the front of buffers that `closes` allows."""
    moves = list(_moves(index, held))
    for buffer in buffers:
        start, line = buffer.data_ptr(), buffer.shape[3] * buffer.itemsize
        for row, to, source, count in moves:
            base = start + row * buffer.shape[2] * line
            ctypes.memmove(base + to * line, base + source * line, count * line)


def _moves(index: torch.Tensor, held: int) -> Iterator[tuple[int, int, int, int]]:
    """(row of B·K, to, from, entries) of each run of entries that moves up, the front ones first."""
    kept, gone = index.shape[2], held - index.shape[2]
    if gone == 1:  # which is what lacks in the sum of all places, and those behind it move by one
        borders = (held * (held - 1) // 2 - index.sum(-1)).reshape(-1, 1).tolist()
    else:
        shift = (index - torch.arange(kept)).flatten(0, 1)  # how far each entry moves: from 0 up to `gone`
        borders = torch.searchsorted(shift, torch.arange(1, gone + 1).expand(len(shift), -1).contiguous()).tolist()
    for row, starts in enumerate(borders):
        for number, (low, high) in enumerate(zip(starts, [*starts[1:], kept], strict=True), start=1):
            if low < high:
                yield row, low, low + number, high - low
