"""Stores that no method makes: every transform, codec and residual, small enough for heads of 8 channels."""

from __future__ import annotations

from typing import Any

import torch

from kvtool.encoding.codecs import Affine, Delta, Levels, Polar, Raw, Sketched, Split, Ternary, WithKeys
from kvtool.encoding.codecs.sketched import signs as sketch_signs
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.encoding.transforms import Gather, Hadamard, Join, Linear, Scale
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Store

PER_TOKEN, PER_CHANNEL = Affine(4, 8, "channel"), Affine(4, 8, "token")


def _bases(kv_heads: int, rank: int, seed: int = 0) -> Linear:
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(kv_heads, 8, 8, generator=draw))[0][..., :rank]
    mean = 0.1 * torch.randn(kv_heads, 8, generator=draw)
    return Linear(basis.contiguous(), basis.transpose(1, 2).contiguous(), mean)


def _whole(width: int, rank: int) -> Linear:
    """Of keys after RoPE, keys without it and values, which lie behind one another."""
    draw = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(1, width, width, generator=draw))[0][..., :rank]
    return Linear(basis.contiguous(), basis.transpose(1, 2).contiguous())


def _pairs(kv_heads: int) -> dict[str, tuple[Encoding, Encoding]]:
    draw = torch.Generator().manual_seed(1)
    scale = Scale(0.5 + torch.rand(kv_heads, 8, generator=draw))
    order = Gather(torch.stack([torch.randperm(8, generator=draw) for _ in range(kv_heads)]), of=8)
    kept = Gather(torch.stack([torch.randperm(8, generator=draw)[:6].sort().values for _ in range(kv_heads)]), of=8)
    signs, normal = torch.tensor([-1.0, 1.0]), torch.tensor([-1.51, -0.453, 0.453, 1.51])
    table, sketch = torch.linspace(-1, 1, 8), torch.randn(8, 16, generator=draw)
    fixed = Levels(table, 1, "channel", "fixed", torch.full((kv_heads, 8), 3.0), torch.zeros(kv_heads, 8))
    pairs = {
        "four-bits": (Encoding(PER_CHANNEL), Encoding(PER_TOKEN)),
        "two-bits": (Encoding(Affine(2, 8, "token")), Encoding(Affine(2, 8, "channel"))),
        "three-bits-rotated": (
            Encoding(Affine(3, 8, "channel"), (Hadamard(),)),
            Encoding(Affine(3, 8, "channel"), (Hadamard(),)),
        ),
        "before-rope": (Encoding(PER_CHANNEL, (scale, order), rotated=False), Encoding(PER_TOKEN, (order,))),
        "low-rank": (Encoding(Raw(), (_bases(kv_heads, 5),)), Encoding(PER_TOKEN, (_bases(kv_heads, 8),))),
        "channels": (Encoding(Raw(), (kept,)), Encoding()),
        "tables": (Encoding(fixed), Encoding(Levels(normal, 8, "channel", "moments"))),
        "signs": (Encoding(Levels(signs, 8, "token", "absolute")), Encoding(Levels(table, 8, "channel", "minmax"))),
        "ternary": (Encoding(Ternary(8, "token")), Encoding(Ternary(8, "channel"))),
        "residuals": (
            Encoding(Affine(2, 8, "token"), outliers=Outliers(1, "token", 8), error=ErrorBasis(2, 8)),
            Encoding(Affine(2, 8, "channel"), (Hadamard(),), Outliers(2, "channel"), ErrorBasis(1, 8)),
        ),
        "eight-bit-floats": (Encoding(Raw("float8_e4m3fn")), Encoding(Raw("bfloat16"))),
        "split": (
            Encoding(Split((Affine(4, 4, "channel"), Ternary(4, "channel")), (4, 4)), (order,)),
            Encoding(Split((Affine(2, 8, "token"), Levels(normal, 8, "token", "norm")), (2, 6)), (order,)),
        ),
        "differences": (
            Encoding(Delta(Affine(8, 8, "channel"), Affine(3, 8, "channel"), 4)),
            Encoding(Delta(PER_TOKEN, Affine(4, 8, "channel"), 8)),
        ),
        "polar": (Encoding(Polar(4, 4, 8)), Encoding(PER_TOKEN)),
        "norms": (
            Encoding(Levels(normal, 8, "channel", "norm", renormalise=True), (Hadamard(),)),
            Encoding(Sketched(Levels(normal, 8, "channel", "norm"), sketch)),
        ),
        "sketch": (
            Encoding(sketch_signs(16), (Linear(sketch[None], sketch.T[None] / 16),)),
            Encoding(Levels(normal, 4, "channel", "norm")),
        ),
        "with-keys": (Encoding(Affine(4, 8, "token"), (_whole(24, 16),), error=ErrorBasis(1, 8)), Encoding(WithKeys())),
    }
    if kv_heads % 2 == 0:
        mix = Linear(
            torch.linalg.qr(torch.randn(1, 16, 16, generator=draw))[0][..., :12].contiguous(), torch.zeros(1, 12, 16)
        )
        mix = Linear(mix.down, mix.down.transpose(1, 2).contiguous())
        pairs["joined"] = (Encoding(Raw(), (Join(2), mix), rotated=False), Encoding(PER_TOKEN, (Join(2), Hadamard())))
        pairs["joined-direct"] = (
            Encoding(Affine(4, 8, "token"), (Join(2), Hadamard())),
            Encoding(PER_TOKEN, (Join(2), Hadamard())),
        )
        pairs["joined-with-keys"] = (Encoding(PER_TOKEN, (Join(2), _whole(48, 32))), Encoding(WithKeys()))
    return pairs


def stored(model: Model, name: str, *, sink: int = 1, recent: int = 3, block: int = 8, **slots: Any) -> Plan:
    """A plan whose store is one of the pairs, or "mixed": another one, or none, for every head."""
    g = model.geometry
    pairs = _pairs(g.kv_heads)
    if name == "mixed":
        free = [pair for pair in pairs.values() if pair[0].joined == 1]
        index = torch.arange(g.layers * g.kv_heads).reshape(g.layers, g.kv_heads) % (len(free) + 1) - 1
        store = Store(tuple(k for k, _ in free), tuple(v for _, v in free), index.int(), sink, recent, block)
    else:
        key, value = pairs[name]
        store = Store((key,), (value,), torch.zeros(g.layers, g.kv_heads).int(), sink, recent, block)
    return Plan(name, model.fingerprint, store=store, **slots)


NAMES = ["four-bits", "two-bits", "three-bits-rotated", "before-rope", "low-rank", "channels", "tables", "signs",
         "ternary", "residuals", "eight-bit-floats", "split", "differences", "polar", "norms", "sketch",
         "with-keys", "mixed"]  # fmt: skip
PAIRED = ["joined", "joined-direct", "joined-with-keys"]  # where the number of KV heads is even
