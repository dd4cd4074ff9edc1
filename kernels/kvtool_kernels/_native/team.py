"""Compiled functions and the threads that run them.

The threads are PyTorch's own where it runs on GNU OpenMP: its idle threads spin for a while after each operation, so
that a second pool would compete with them for the cores. Elsewhere they are plain threads.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

# Numba keeps compiled code by the file of the outermost function alone; a function that closes over this number is
# compiled anew when any of these files changes.
STAMP = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def compiled(signature: str, function: Callable[..., Any]) -> int:
    """The address of a function as machine code, from disk if it was compiled before."""
    try:
        made = numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError:  # there is no folder that Numba may write to
        made = numba.cfunc(signature, error_model="numpy")(function)
    _kept.append(made)
    assert made.address is not None
    return made.address


_kept: list[Any] = []  # the code lives as long as its object


def run(address: int, job: np.ndarray[Any, np.dtype[np.int64]], threads: int) -> None:
    """`threads` calls of a function of one pointer, at the same time. They share out the work among themselves."""
    pointer, parallel = job.ctypes.data, _openmp()
    if threads == 1:
        _callable(address)(pointer)
    elif parallel is not None:
        parallel(address, pointer, threads, 0)
    else:
        list(_pool(threads).map(_callable(address), [pointer] * threads))


@functools.lru_cache(maxsize=8)
def _callable(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@functools.lru_cache(maxsize=1)
def _openmp() -> Callable[..., None] | None:
    if not torch.backends.openmp.is_available():
        return None
    try:
        parallel = ctypes.CDLL("libgomp.so.1").GOMP_parallel  # the one that PyTorch has loaded has this name
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
