"""TurboQuant: turn each entry at random, so that its numbers are normal whatever it was, and code them for that.

Zandieh et al., arXiv 2504.19874, ICLR 2026. No code by the authors; the production variant is vLLM's.

    z = x·Π,  s = ‖x‖/√D;   code = the nearest of the 2^b levels that suit a unit normal best;   x̂ = s·level[code]·Πᵀ
    E‖x − x̂‖² / ‖x‖² = 0.363, 0.1175, 0.0345, 0.0095 for b = 1 … 4;   memory: b + 16/D bits a number

Nothing is measured. Keys are turned after RoPE, together with the query. As in production: Π is a Hadamard matrix
after random signs; s is ‖x‖/‖level[code]‖, so that no entry shrinks (`correct`); values are not turned but coded in 2^b
even steps between the least and the largest number of an entry (b + 32/D bits a number; `coding=rotated` treats them as
keys); the first and last `skip` layers stay raw. A matrix by QR is the paper's (`rotation=random`).

b may be a fraction: of b = 2.25 a quarter of the channels, the loudest, takes 3 bits and the others 2, each part turned
by a random matrix of its own with its own norm (the paper's "2.5 bits", which are 2.25 for codes, and 2.5 with both
norms at D = 128). Which are the loudest is measured on texts, or read from a trace; how the paper finds them we do not
know. `unbiased`: keys take b − 1 bits, and the signs of a random sketch of the error with its norm, which make q·x̂
right in the mean (b + 32/D bits); production found that it hurts, as noise passes through the softmax.

Reconstructed: the paper from a specification and from memory. Ours: entries leave a raw window `block` at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine, Codec, Levels, Sketched, Split
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.tables import normal
from kvtool.encoding.transforms import Gather, Hadamard, Linear, Scale, Transform
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.methods._rotations import channels, loudest, rotation, sketch
from kvtool.options import at_least
from kvtool.slots import RAW, Store

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """keys: bits of keys, 1 to 8, or a fraction between, for so many channels that take one bit more. values: the same
    of values. rotation: of whole bits, hadamard (with random signs) or random. coding: of values, uniform (even steps,
    not turned) or rotated (as keys). correct: decoded entries have the norm of the original. unbiased: one of a key's
    bits is the sign of a sketch of the error. skip: first and last layers that stay raw, so many each. sink: first
    entries that stay raw. recent: newest entries that stay raw. block: entries that leave the raw window together.
    samples, tokens: texts on which fractions look for loud channels, and their length."""

    keys: float = 4.0
    values: float = 4.0
    rotation: Literal["hadamard", "random"] = "hadamard"
    coding: Literal["uniform", "rotated"] = "uniform"
    correct: bool = True
    unbiased: bool = False
    skip: int = 2
    sink: int = 0
    recent: int = 0
    block: int = 32
    samples: int = 4
    tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            if not 1 <= getattr(self, name) <= 8:
                raise InputError(f"bad option {name}", got=getattr(self, name), expected="1 to 8 bits")
        if self.unbiased and (self.keys < 2 or self.keys % 1):
            raise InputError("a sketch takes one of several whole bits", got=self.keys, expected="keys 2, 3, ... or 8")
        at_least(0, self, "skip")


def at(budget: float) -> dict[str, Any]:
    """Whole bits below the budget, with 16 and 32 bits beside the codes of heads of 64 channels; no layer is left out.
    The odd bit goes to keys."""
    both = math.floor(32 * budget - 0.75)
    return {"keys": min(8, max(1, -(-both // 2))), "values": min(8, max(1, both // 2)), "skip": 0}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    if options.keys % 1 or options.values % 1:
        context = replace(context, trace=channels(context, samples=options.samples, tokens=options.tokens))
    draw = torch.Generator().manual_seed(context.seed)
    keys = _side(context, options, options.keys, "k", draw)
    values = _side(context, options, options.values, "v", draw)
    number = max(len(keys), len(values))  # one for all layers, or each its own
    keys, values = (side * number if len(side) < number else side for side in (keys, values))
    index = (torch.arange(g.layers) % number)[:, None].repeat(1, g.kv_heads).int()
    index[: options.skip] = index[g.layers - options.skip :] = RAW
    return Decision(store=Store(keys, values, index, options.sink, options.recent, options.block))


def _side(context: Context, options: Options, bits: float, kind: str, draw: torch.Generator) -> tuple[Encoding, ...]:
    """The encodings of keys ("k") or values ("v"): one for all layers, or one for each."""
    width, even = context.geometry.head_dim, kind == "v" and options.coding == "uniform"
    if bits % 1:
        return _parts(loudest(context.seen, kind), bits, draw, even=even, correct=options.correct)
    if even:
        return (Encoding(Affine(int(bits), width, "channel")),)
    steps: tuple[Transform, ...]
    if options.rotation == "hadamard":
        signs = torch.randint(0, 2, (1, width), generator=draw) * 2.0 - 1.0
        steps = (Scale(signs), Hadamard())
    else:
        steps = (_turn(rotation(width, draw)[None]),)
    if options.unbiased and kind == "k":
        base = _levels(int(bits) - 1, width, correct=False)
        return (Encoding(Sketched(base, sketch(width, 1, draw)), steps),)
    return (Encoding(_levels(int(bits), width, correct=options.correct), steps),)


def _parts(
    orders: torch.Tensor, bits: float, draw: torch.Generator, *, even: bool, correct: bool
) -> tuple[Encoding, ...]:
    """Two widths of code: orders int64 [L,K,D], the loudest channels first."""
    width, low = orders.shape[-1], int(bits)
    loud = min(max(round(width * (bits - low)), 1), width - 1)
    widths = (loud, width - loud)
    codecs: tuple[Codec, ...]
    if even:
        codecs = tuple(Affine(b, w, "channel") for b, w in zip((low + 1, low), widths, strict=True))
        return tuple(Encoding(Split(codecs, widths), (Gather(order, width),)) for order in orders)
    codecs = tuple(_levels(b, w, correct=correct) for b, w in zip((low + 1, low), widths, strict=True))
    turn = torch.block_diag(*(rotation(w, draw) for w in widths))
    bases = (turn[order.argsort(-1)] for order in orders)  # row c is where channel c stands in its order
    return tuple(Encoding(Split(codecs, widths), (_turn(basis),)) for basis in bases)


def _levels(bits: int, width: int, *, correct: bool) -> Levels:
    return Levels(normal(bits), width, "channel", "norm", renormalise=correct)


def _turn(basis: torch.Tensor) -> Linear:
    """basis [K|1,D,D], orthogonal."""
    return Linear(basis.contiguous(), basis.transpose(1, 2).contiguous())
