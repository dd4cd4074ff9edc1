"""Prompts of different lengths in one row of tokens: nothing is padded, and no prompt sees another.

    ids        [p_1 p_2 … p_n]                    one row, Σ len tokens, through every linear layer at once
    positions  [a_1 … a_1 + len_1 − 1, a_2 …]     each prompt's own
    attention  o_i = attend(q_i, k_i, v_i)        on each prompt's slice, Σ len² instead of (Σ len)²

which is attention under a block-diagonal causal mask, without the mask (prepacking: Zhao et al., arXiv 2404.09529). Who
attends is the caller's: an observer of each prompt (`observing/forward.py`), or each prompt's cache
(`cache/share/together.py`), which then holds what a pass of its own would have put there. A piece may be a batch of B_i
rows of one length.

The released code packs bins of the longest prompt's length, which are a padded batch, and feeds every prompt but for
its last token. Here a row is a pass of its own and has no padding, so that `bins` need not look for the best fit: a row
that is not full costs nothing but its own pass.

Shapes: pieces int64 [B_i,T_i]; q, k, v [1,·,Σ B_i·T_i,D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from kvtool.serving import Attention, Layer

Pieces = list[torch.Tensor]


def bins(lengths: Sequence[int], room: int, most: int | None = None) -> list[list[int]]:
    """Numbers of the prompts that share a row: in order, `most` of them and `room` tokens at most. What is longer has a
    row alone."""
    rows: list[list[int]] = []
    left = -1
    for index, length in enumerate(lengths):
        if not rows or length > left or len(rows[-1]) == most:
            rows.append([])
            left = room
        rows[-1].append(index)
        left -= length
    return rows


class Attends(Protocol):
    """Whoever attends for one piece in one layer."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        """As `serving.Layer.attend`."""


class Row:
    """Pieces one behind the other; `starts`: the position of each one's first token."""

    def __init__(self, pieces: Sequence[torch.Tensor], starts: Sequence[int]):
        self.shapes = [(len(piece), piece.shape[1]) for piece in pieces]
        self.sizes = [rows * tokens for rows, tokens in self.shapes]
        self.ids = torch.cat([piece.flatten() for piece in pieces])[None]
        device = self.ids.device
        places = [torch.arange(at, at + n, device=device) for at, (_, n) in zip(starts, self.shapes, strict=True)]
        each = [place.repeat(rows) for place, (rows, _) in zip(places, self.shapes, strict=True)]
        self.positions = torch.cat(each)[None]

    def cut(self, x: torch.Tensor) -> Pieces:
        """x [1,Σ,C] → [B_i,T_i,C]"""
        return [part[0].unflatten(0, shape) for part, shape in zip(x.split(self.sizes, 1), self.shapes, strict=True)]

    def heads(self, x: torch.Tensor) -> Pieces:
        """x [1,H,Σ,D] → [B_i,H,T_i,D]"""
        parts = zip(x.split(self.sizes, 2), self.shapes, strict=True)
        return [part if rows == 1 else part[0].unflatten(1, (rows, n)).transpose(0, 1) for part, (rows, n) in parts]

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `heads`."""
        return torch.cat([part if len(part) == 1 else part.transpose(0, 1).flatten(1, 2)[None] for part in parts], 2)

    @property
    def last(self) -> torch.Tensor:
        """Where the last tokens of all rows of all pieces stand, int64 [Σ B_i]."""
        ends = [torch.arange(1, rows + 1) * tokens for rows, tokens in self.shapes]
        firsts = torch.tensor([0, *self.sizes]).cumsum(0)
        return torch.cat([first + end - 1 for first, end in zip(firsts[:-1], ends, strict=True)]).to(self.ids.device)


class Packed(Layer):
    """One layer of a pass over a row: piece i is attended by `inside[i]`."""

    def __init__(self, row: Row, inside: Sequence[Attends]):
        super().__init__()
        self.row, self.inside = row, inside

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        row = self.row
        ids, places = row.cut(row.ids[..., None]), row.cut(row.positions[..., None])
        outs = []
        for number, (mine, k_mine, v_mine) in enumerate(zip(row.heads(q), row.heads(k), row.heads(v), strict=True)):
            own = replace(call, padding=None, tokens=ids[number][..., 0], positions=places[number][..., 0])
            outs.append(self.inside[number].attend(mine, k_mine, v_mine, own))
        return row.joined(outs)

    def get_seq_length(self) -> int:
        return 0


def run(network: Any, row: Row, layers: Sequence[Layer], **options: Any) -> Any:
    """One pass of `network` over the row."""
    return network(
        input_ids=row.ids,
        position_ids=row.positions,
        past_key_values=Cache(layers=list(layers)),
        use_cache=True,
        **options,
    )
