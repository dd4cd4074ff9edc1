"""Methods that decide how an entry is encoded."""

from __future__ import annotations

from tests.laws.rows._base import Row

ROWS = {
    "kivi": Row(
        tiny=(dict(bits=2, group=8, recent=3, block=8), dict(bits=4, group=8, recent=0, block=16, sink=2)),
        lossless=(dict(group=8, recent=900, block=8),),
        ladder=tuple(dict(bits=bits, group=8, recent=0, block=8) for bits in (1, 2, 4, 8)),
        loss=1e-3,  # keys made of zeros and ones survive much
    ),
}
