"""Branches of a lane: what no later token changes is shared with it, and what may change is copied.

Full sinks and the bulk are shared, and recent entries too where no block leaves them. What a reader chooses from stays
one bulk, which goes on behind what is shared (`grafted.py`).
"""

from __future__ import annotations

import copy
from typing import TypeVar

from kvtool.cache.ordered import Ordered
from kvtool.cache.segments import Dense
from kvtool.cache.share.grafted import Grafted
from kvtool.cache.share.shared import Shared
from kvtool.cache.store.coded import Coded

Like = TypeVar("Like", bound=Ordered)


def branched(lane: Like) -> Like:
    """As `Lane.branch`, of a lane whose entries no later token changes."""
    made = copy.copy(lane)
    made.fits = False
    if isinstance(lane.bulk, Coded):
        made.encodings = (lane.bulk.key, lane.bulk.value)
    made.bulk, made.shared = made.fresh(), [copy.copy(shared) for shared in lane.shared]
    held = lane.bulk if isinstance(lane.bulk, Grafted) else None
    bulk = lane.bulk if held is None else held.own
    grafts = [] if held is None else [shared.again() for shared in held.shared]
    parts = [lane.recent] if lane.block is None else [lane.sinks, bulk] if lane.lacking() == 0 else []
    first = 0
    for part in parts:
        if part.length:
            places = None if lane.positions is None else lane.positions[:, :, first : first + part.length]
            places = None if places is None else places + lane.origin
            shared = Shared(part, len(lane.heads), lane.ahead() + first + lane.origin, places)
            (grafts if part is bulk and lane.reader is not None else made.shared).append(shared)
        first += part.length
    if lane.positions is not None:
        made.positions = lane.positions[:, :, first:].clone()
    for name in ("sinks", "recent"):
        mine, own = getattr(lane, name), Dense()
        if mine not in parts and mine.length:
            own.append(*mine.recall())
        setattr(made, name, own)
    if lane.reader is not None:
        made.reader = lane.reader.branch()
        made.reader.places.of = made.places
        made.bulk = Grafted(grafts, made.bulk) if grafts else made.bulk
    return made
