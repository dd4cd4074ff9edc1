"""What the compiled loops are told: a row of int64 fields, for the job and for each of its sides.

Addresses and sizes only, so that one compiled function serves every shape, layout and number of bits.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from kvtool_kernels.packed import Packed
from kvtool_kernels.packing.reference import planes

LANES = 16
FEW = 16  # query rows per KV head that the loops take
AT_ONCE = 4  # of these
FP32, FP16, BF16 = 0, 1, 2
DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
DENSE, TOKEN, CHANNEL = 0, 1, 2
PER_RUN, PER_LANE = 63, 0  # values of SHIFT: a scale serves 2^SHIFT codes of a run

# A side. Steps and strides of codes count bytes, of dense entries and scales elements.
(
    KIND, DATA, BATCH_STRIDE, HEAD_STRIDE, STEP, WIDTH, DTYPE, GROUP, RUN, SHIFT, EXPANDED, SCALE, ZERO, SCALE_DTYPE,
    SCALE_BATCH, SCALE_HEAD, SCALE_STEP, LEVELS, PLANES, PLANE, LENGTH, TAKEN,
    COUNT, APART, INDEX, VALUE, APART_BATCH, APART_HEAD, WHOLE,
) = (*range(20), 22, 25, 28, 29, 30, 31, 32, 33, 34)  # fmt: skip
SIDE = 35
# PLANE, LENGTH and TAKEN are three fields each: the function, its bytes per run, the bits below. COUNT: of levels;
# APART: outliers of an entry, INDEX and VALUE where they are; WHOLE: parts of planes make whole vectors

# A job: decoding has one side, attention two for each lane, which LANES_AT points to.
(
    NEXT, THREAD, UNITS, HEADS, TOKENS, TILE, CHUNK, SPLITS, OUT, SCRATCH, SCRATCH_SIZE,
    PASSES, ROWS, QUERY, LSE, PART, DONE, SOFTCAP, LOGITS, LANES_AT, PIECES, STARTS, FIRST_SIDE,
) = range(23)  # fmt: skip
JOB = FIRST_SIDE + SIDE
KEYS, VALUES, ENTRIES, LANE = 0, SIDE, 2 * SIDE, 2 * SIDE + 1  # of a lane: its sides, its entries, its size
# a piece of attention's work, one row of a table: what `schedule.py` deals out, and where it lies
P_LANE, P_BATCH, P_HEAD, P_GROUP, P_FIRST, P_LAST, P_SPLIT, P_SPLITS, PIECE = range(9)


def numbers(*shape: int) -> torch.Tensor:
    """fp32 on the CPU, whatever PyTorch's defaults are, not yet written."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def padded(width: int) -> int:
    """Channels of a row in a tile: whole vectors."""
    return -(-width // LANES) * LANES


def served(
    q: torch.Tensor, keys: Packed | torch.Tensor, values: Packed | torch.Tensor, heads: int | None = None
) -> bool:
    """Whether the loops can attend: few queries, sides that they can read, and nothing to differentiate. heads: the KV
    heads of q, where these are some of them."""
    heads = heads or (values.codes if isinstance(values, Packed) else values).shape[1]
    tensors = (q, *(side for side in (keys, values) if isinstance(side, torch.Tensor)))
    fixed = not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors)
    return fixed and q.shape[1] // heads * q.shape[2] <= FEW and readable(keys) and readable(values)


def readable(side: Packed | torch.Tensor) -> bool:
    """Whether the loops can read a side: along tokens, whole vectors of codes."""
    if isinstance(side, torch.Tensor):
        return side.dtype in DTYPES
    scale, zero, levels = side.scale, side.zero, side.levels
    like = zero is None or (zero.dtype == scale.dtype and zero.shape == scale.shape)
    table = levels is None or (levels.dtype == torch.float32 and levels.is_contiguous())
    apart = side.outliers is None or [x.dtype for x in side.outliers] == [torch.int16, torch.float16]
    return (
        scale.dtype in DTYPES
        and like
        and table
        and apart
        and (side.layout == "channel" or _whole(side.bits, side.group))
    )


def describe(side: Packed | torch.Tensor) -> list[int]:
    """The fields of a readable side whose inner dimensions are contiguous (`laid_out`)."""
    if isinstance(side, torch.Tensor):
        fields = [DENSE, side.data_ptr(), side.stride(0), side.stride(1), side.stride(2), side.shape[-1]]
        return [*fields, DTYPES[side.dtype], *[0] * (SIDE - len(fields) - 1)]
    token, run, scale, codes = side.layout == "token", _run(side), side.scale, side.codes
    whole = _whole(side.bits, run)
    shift, expanded = _sharing(side.group, run, whole)
    simple = shift == PER_RUN or side.levels is not None  # levels are scaled after they are looked up
    batch, head, entry = (0 if n == 1 else step for n, step in zip(scale.shape[:3], scale.stride()[:3], strict=True))
    return [
        TOKEN if token else CHANNEL, codes.data_ptr(), codes.stride(0), codes.stride(1), codes.shape[-1], side.width,
        0, side.group, run, shift, expanded, scale.data_ptr(), 0 if side.zero is None else side.zero.data_ptr(),
        DTYPES[scale.dtype], batch, head, side.width if token else entry,
        0 if side.levels is None else side.levels.data_ptr(), *_plane_fields(side.bits, run, simple),
        0 if side.levels is None else len(side.levels), *_apart(side.outliers), whole,
    ]  # fmt: skip


def laid_out(side: Packed | torch.Tensor) -> Packed | torch.Tensor:
    """A side whose entries follow one another as the loops expect; batches and heads may lie anywhere."""
    if isinstance(side, torch.Tensor):
        return side if side.stride(-1) == 1 else side.contiguous()
    alike = side.zero is None or side.zero.stride() == side.scale.stride()
    if side.outliers is not None:
        index, value = side.outliers
        if index.stride() != value.stride() or not _dense_inside(index):
            side = dataclasses.replace(side, outliers=(index.contiguous(), value.contiguous()))
    if alike and _dense_inside(side.codes) and _dense_inside(side.scale):
        return side
    zero = None if side.zero is None else side.zero.contiguous()
    return dataclasses.replace(side, codes=side.codes.contiguous(), scale=side.scale.contiguous(), zero=zero)


def _dense_inside(tensor: torch.Tensor) -> bool:
    """Whether everything behind batch and head is contiguous."""
    expected = 1
    for size, stride in zip(tensor.shape[:1:-1], tensor.stride()[:1:-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _apart(outliers: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[int, ...]:
    if outliers is None:
        return (0,) * 5
    index, value = outliers
    return index.shape[-1], index.data_ptr(), value.data_ptr(), index.stride(0), index.stride(1)


def _run(side: Packed) -> int:
    """Codes that are packed together."""
    return side.group if side.layout == "token" else side.width


@functools.lru_cache(maxsize=256)
def _whole(bits: int, run: int) -> bool:
    """Whether the parts of each plane are whole vectors, or several of them make one."""
    return not run % LANES and all(not n % LANES or n in (8, 4, 2) for n in (run * p // 8 for p in planes(bits)))


def _sharing(group: int, run: int, whole: bool) -> tuple[int, int]:
    """(SHIFT, EXPANDED): how codes of a run find their scale."""
    if group == run:
        return PER_RUN, 0
    if whole and group % LANES == 0 and group & group - 1 == 0:
        return group.bit_length() - 1, 0
    return PER_LANE, int(group > 1)


@functools.lru_cache(maxsize=256)
def _plane_fields(bits: int, run: int, simple: bool) -> tuple[int, ...]:
    from kvtool_kernels._native.plane import per_code, per_run  # only where codes are read: Numba is slow to import

    powers = planes(bits)
    lengths = [run * power // 8 for power in powers]
    taken = [sum(powers[:index]) for index in range(len(powers))]
    plane = per_run if simple else per_code
    whole = _whole(bits, run)
    functions = [plane(p, min(n, LANES) if whole else 0, not t) for p, n, t in zip(powers, lengths, taken, strict=True)]
    filled = [[*numbers, *[0] * (3 - len(powers))] for numbers in (functions, lengths, taken)]
    return len(powers), *filled[0], *filled[1], *filled[2]
