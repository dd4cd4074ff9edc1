"""QJL: of each key the signs of a random sketch and its norm; values in a few bits.

Zandieh et al., arXiv 2406.03482, AAAI 2025, with its released code.

    code = sign(k·S), and ‖k‖;   q·k ≈ √(π/2)/m · ‖k‖ · ⟨q·S, code⟩    S: D×m, the query's sketch is not rounded

The mean over random S is q·k, the variance ((π/2)‖q‖²‖k‖² − (q·k)²)/m for Gaussian S. Here as there S is m/D random
rotations times √D, which err less, and overshoot by 1 + 1/(4D). That is a transform to m channels and a table of two
levels, ±√(π/2) in units of the root mean square, so attention runs on the signs. Channels that are loud are sketched
apart, with a norm of their own, so that they do not drown the others.

    memory, bits a number:  keys (m + m_out)/D + 32/D;  values `values` + 32/`group`

The released code keeps ‖k‖ and ‖k_out‖, and has the others' norm from them; the bytes are the same. Departures: it
picks the loud channels anew in every 32 tokens, here they are each head's loudest on texts, known beforehand; its
values leave a raw window of their own, here keys and values leave together, `block` at a time. Which S it draws for
which layer we do not know: all layers share ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kvtool.encoding.codecs import Affine, Codec, Split
from kvtool.encoding.codecs.sketched import signs
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Linear
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.methods._rotations import loudest, sketch
from kvtool.options import at_least
from kvtool.slots import Store

STATISTICS = ("channels",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """sketch: sign bits a number of a key, m/D, of the first `early` layers and of the others. outliers: loud channels
    that are sketched apart. apart: sign bits a number of their sketch, m_out/D, of the first `early` layers and of the
    others. early: see there. values: bits of values, 1 to 8. group: channels of a value that share a range. recent:
    newest entries that stay raw. block: entries that leave the raw window together. sink: first entries that stay
    raw."""

    sketch: tuple[int, ...] = (4, 2)
    outliers: int = 8
    apart: tuple[int, ...] = (1, 2)
    early: int = 15
    values: int = 2
    group: int = 32
    recent: int = 0
    block: int = 128
    sink: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "sketch", "apart")
        at_least(0, self, "outliers", "early")
        for name in ("sketch", "apart"):
            if len(getattr(self, name)) != 2:
                raise InputError(f"bad option {name}", got=getattr(self, name), expected="two numbers, like 4,2")


def at(budget: float) -> dict[str, Any]:
    """Half of the bits for values, with 32 beside 32 codes; of a key's, one sketches outliers where there are several;
    norms count as in heads of 64 channels."""
    values = min(8, max(1, math.floor(8 * budget)))
    keys = 32 * budget - values - 1
    several = keys >= 2.5
    rows = max(1, math.floor(keys - (1.5 if several else 0.25)))
    return {"sketch": (rows, rows), "apart": (1, 1), "outliers": 8 if several else 0, "values": values}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    if options.outliers >= g.head_dim:
        raise InputError("bad option outliers", got=options.outliers, expected=f"fewer than {g.head_dim} channels")
    draw = torch.Generator().manual_seed(context.seed)
    drawn = sketch(g.head_dim, max(*options.sketch, *options.apart), draw)
    rows, others = ([copies * g.head_dim for copies in each] for each in (options.sketch, options.apart))
    late = (torch.arange(g.layers) >= options.early).int()
    if options.outliers:
        loud = loudest(context.seen, "k")[..., : options.outliers]
        keys = tuple(_apart(drawn, mine, rows[at], others[at]) for mine, at in zip(loud, late.tolist(), strict=True))
        late = torch.arange(g.layers).int()
    else:
        keys = tuple(_whole(drawn, m) for m in rows)
    values = (Encoding(Affine(options.values, options.group, "channel")),) * len(keys)
    index = late[:, None].repeat(1, g.kv_heads)
    return Decision(store=Store(keys, values, index, options.sink, options.recent, options.block))


def _whole(drawn: torch.Tensor, m: int) -> Encoding:
    """One sketch of all channels; the same layout in memory as a file gives, so that products round alike."""
    down = drawn[None, :, :m].contiguous()
    return Encoding(signs(m), (Linear(down, (down / m).transpose(1, 2).contiguous()),))


def _apart(drawn: torch.Tensor, loud: torch.Tensor, m: int, others: int) -> Encoding:
    """Two sketches side by side: of each head's channels but for `loud` int64 [K,n], and of these."""
    mask = torch.zeros(len(loud), len(drawn)).scatter(1, loud, 1.0)[..., None]
    inner, outer = drawn[:, :m] * (1 - mask), drawn[:, :others] * mask  # [K,D,m], [K,D,others]
    up = torch.cat([inner / m, outer / others], dim=-1).transpose(1, 2).contiguous()
    codec: Codec = signs(m) if m == others else Split((signs(m), signs(others)), (m, others))
    return Encoding(codec, (Linear(torch.cat([inner, outer], dim=-1), up),))
