"""What the Triton attention kernels share: the running softmax, and the split of a long segment between programs.

A program holds a tile of query rows (the query heads of one KV head, times some tokens) and walks over blocks of
entries. Logits are in base 2 (the scale carries log2 e), so that weights are one `exp2` each; log-sum-exps leave in
natural log. Only Triton twins import this module: Triton is slow to import and has wheels on Linux only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PROGRAMS = 4  # aimed at by the interpreter, which has no multiprocessors to fill
INTERPRETED_TILE = (256, 128)  # its time goes by operations, not by elements
SPLIT = 128  # entries that a split has at least


@triton.jit
def dot(a, b):
    """a @ b, summed in fp32; fp32 operands are not rounded to TF32."""
    if INTERPRETED:  # its bf16 is a bit pattern, which numpy would multiply as an integer
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def capped(logits, scale, softcap):
    """scale · logits in base 2, after the soft cap where there is one."""
    if softcap is None:
        return logits * (scale * LOG2E)
    else:
        return (softcap * LOG2E) * (2.0 * tl.sigmoid(2.0 * scale / softcap * logits) - 1.0)


@triton.jit
def weigh(logits, top, total):
    """One block of logits [M,N] joins the running maximum and sum [M].

    Returns weights [M,N] relative to the new maximum, the factor [M] for what was summed before, maximum, sum.
    """
    new = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weights are 0, not NaN
    keep = tl.exp2(top - base)
    weights = tl.exp2(logits - base[:, None])
    return weights, keep, new, total * keep + tl.sum(weights, 1)


@triton.jit
def finish(acc, top, total):
    """Sums relative to a maximum → out [M,D], lse [M]; (0, −inf) where nothing was seen."""
    seen = tl.where(total == 0.0, 1.0, total)
    return acc / seen[:, None], tl.where(total == 0.0, float("-inf"), (top + tl.log2(seen)) * LN2)


@triton.jit  # type: ignore[untyped-decorator]
def store(out, lse, value, level, part, inside, rows, width, D: tl.constexpr):
    """Rows [M] of one split: value [M,D] and level [M] into out [parts,rows,width] and lse [parts,rows]."""
    row = part + rows
    channel = tl.arange(0, D)
    at = out + row[:, None] * width + channel[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=inside[:, None] & (channel[None, :] < width))
    tl.store(lse + row, level, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def combine_kernel(outs, lses, out, lse, rows, width, splits, D: tl.constexpr):
    """outs [splits,rows,D] and lses [splits,rows] → out [rows,D], lse [rows]."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    inside = channel < width
    top = tl.load(lses + row)
    for split in range(1, splits):
        top = tl.maximum(top, tl.load(lses + row + tl.cast(rows, tl.int64) * split))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for split in range(splits):
        place = row + tl.cast(rows, tl.int64) * split
        weight = tl.exp(tl.load(lses + place) - base)
        total += weight
        acc += weight * tl.load(outs + place * width + channel, mask=inside, other=0.0)
    seen = tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * width + channel, (acc / seen).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), base + tl.log(seen)))


class Partials:
    """Where the programs of one call write: the result itself, or one partial result per split until `merged`."""

    def __init__(self, q: torch.Tensor, width: int, programs: int, entries: int, block: int):
        """q [B,H,T,·]; out has `width` channels. `programs` run per split; a split covers a multiple of `block`."""
        device = q.device
        aim = 2 * torch.cuda.get_device_properties(device).multi_processor_count if q.is_cuda else PROGRAMS
        longest = max(block, SPLIT)
        splits = max(1, min(aim // max(programs, 1), triton.cdiv(entries, longest)))
        self.chunk = max(1, triton.cdiv(triton.cdiv(entries, splits), block)) * block
        self.splits = max(1, triton.cdiv(entries, self.chunk))
        self._out = q.new_empty(*q.shape[:3], width)
        self._lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        self.rows = self._lse.numel()
        self.out, self.lse = self._out, self._lse
        if self.splits > 1:
            self.out = torch.empty(self.splits, *self._out.shape, dtype=torch.float32, device=device)
            self.lse = torch.empty(self.splits, *self._lse.shape, dtype=torch.float32, device=device)

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out [B,H,T,width] in q's dtype, lse [B,H,T] fp32."""
        width = self._out.shape[-1]
        if self.splits > 1:
            combine_kernel[(self.rows,)](
                self.out, self.lse, self._out, self._lse, self.rows, width, self.splits, D=triton.next_power_of_2(width)
            )  # fmt: skip
        return self._out, self._lse


def channels_last(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each tensor with its channels next to each other, copied only where they are not."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def pad(size: int) -> int:
    """The width of the block that holds `size`: a power of two, and no less than tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def blocks(rows: int, width: int, dtype: torch.dtype, entries: int = 64) -> dict[str, int]:
    """Query rows M and (up to `entries`) entries N of a tile, with warps that hold it without spilling.

    The numbers are what compiles without spills for every target (tests/kernels/test_compile.py); none was timed.
    """
    exact, narrow = dtype == torch.float32, width <= 128
    tall, wide = (16, 16) if exact else (64, entries if narrow else 32)
    if INTERPRETED.value:
        tall, wide = INTERPRETED_TILE
    high = max(16, min(tall, triton.next_power_of_2(rows)))
    many = narrow if exact else high > 32
    return {"M": high, "N": wide, "num_warps": warps(8 if many else 4), "num_stages": 1 if exact else 2}


def warps(count: int) -> int:
    """`count` warps of 32 threads; AMD's waves have 64."""
    return count // 2 if torch.version.hip and count > 1 else count
