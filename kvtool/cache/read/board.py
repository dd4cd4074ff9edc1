"""What a layer that chooses tells the layers that go by its scores, within one call of the network.

A call runs layer by layer, and a layer may run through many tokens: every token's scores stand here until the last
follower has taken them, so that the board is empty between calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvtool.cache.store.pool import Pool
from kvtool.rotary import NONE, Rotary, Tables

if TYPE_CHECKING:
    from kvtool.cache.keep.memo import Account

Post = tuple[torch.Tensor, torch.Tensor | None]  # which choosers choose anew, bool [B,C]; and if any, scores [B,C,U]


class Board:
    """One for all layers and parts of a cache. Keys name a part of the batch, a layer, a KV head and a read."""

    def __init__(self) -> None:
        self.posts: dict[tuple[int, ...], tuple[int, Post]] = {}
        self.tables: Tables = {}  # of rotations, computed once a call for all layers
        self.boundaries: dict[int, torch.Tensor] = {}  # by part: how much of one each entry's place is, [B,N]
        self.cuts: dict[tuple[int, int], torch.Tensor] = {}  # by part and block: those that count for it, bool [B,N]
        self.pools: dict[tuple[int, int], Pool] = {}  # by part and first layer, of layers that are written as one
        self.account: Account | None = None  # what is observed of a prompt is shared through, while it is adopted

    def rotary(self, rotary: Rotary) -> Rotary:
        """The same, sharing its tables with other layers until the last layer is done."""
        return replace(rotary, tables=self.tables)

    def clear(self) -> None:
        """The last layer is done: what the next call will not need goes."""
        for held in (self.tables, self.boundaries, self.cuts):
            held.clear()

    def post(self, key: tuple[int, ...], readers: int, post: Post) -> None:
        """For so many readers."""
        self.posts[key] = (readers, post)

    def take(self, key: tuple[int, ...]) -> Post:
        """What was posted; the last reader removes it."""
        readers, post = self.posts.pop(key)
        if readers > 1:
            self.posts[key] = (readers - 1, post)
        return post


@dataclass(frozen=True)
class Place:
    """Whose reader it is: the part of the batch, the layer, the lane's KV heads, the cache's board, and RoPE."""

    part: int
    layer: int
    heads: tuple[int, ...]
    board: Board
    rotary: Rotary = NONE
