"""Exact rotation and inverse rotation of keys and queries, in whatever convention the model uses.

The rotation tables come from the model's own rotary module, so every RoPE scaling rule is its own. Which channels
pair up (half-split or interleaved) and how many are rotated is found by a test: in layer 0 the same token at two
positions must have the same key once its rotation is undone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvtool.errors import InputError
from kvtool_kernels.precision import wide

Table = tuple[torch.Tensor, torch.Tensor]
Tables = dict[tuple[object, ...], Table]


@dataclass(frozen=True)
class Rotary:
    """One layer's RoPE. `module` is None for a layer without one; then every method is the identity."""

    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    width: int  # how many of the head's first channels are rotated
    interleaved: bool
    doubled: bool = False  # the module gives each angle once (GPT-OSS), not once a channel
    tables: Tables | None = field(default=None, compare=False, repr=False)  # `rows` by kind, for whoever shares them

    @property
    def kind(self) -> tuple[object, ...]:
        """Layers of the same kind have the same tables."""
        fixed = (*self.args, *self.kwargs.values())
        return (id(self.module), *(str(value) for value in fixed if not isinstance(value, torch.Tensor)))

    def table(self, positions: torch.Tensor) -> Table | None:
        """positions int64 [...] → (cos, sin) fp32 [..., width], scaling factors included."""
        if self.module is None:
            return None
        flat = positions.reshape(1, -1)
        args = tuple(flat if _is_positions(value) else value for value in self.args)
        kwargs = {name: flat if _is_positions(value) else value for name, value in self.kwargs.items()}
        with torch.no_grad():
            cos, sin = self.module(*args, **kwargs)
        if self.doubled:
            cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        return tuple(part[0].float().reshape(*positions.shape, -1) for part in (cos, sin))

    def rows(self, count: int, device: torch.device) -> Table:
        """(cos, sin) fp32 [count, width/2] of positions 0 … count − 1, once a pair."""
        if self.module is None:
            return torch.ones(count, 0, device=device), torch.ones(count, 0, device=device)
        held = None if self.tables is None else self.tables.get(self.kind)
        if held is None or len(held[0]) < count:
            table = self.table(torch.arange(count, device=device))
            assert table is not None
            half = self.width // 2
            cos, sin = (part[:, 0::2] if self.interleaved else part[:, :half] for part in table)
            held = cos.contiguous(), sin.contiguous()
            if self.tables is not None:
                self.tables[self.kind] = held
        return held[0][:count], held[1][:count]

    def rotate(self, x: torch.Tensor, table: Table | None) -> torch.Tensor:
        """x [..., T, D] pre-RoPE, table [..., T, width] broadcastable → post-RoPE."""
        if table is None:
            return x
        cos, sin = table
        head, rest = wide(x[..., : self.width]), x[..., self.width :]
        return torch.cat([(head * cos + self._quarter(head) * sin).to(x.dtype), rest], dim=-1)

    def unrotate(self, x: torch.Tensor, table: Table | None) -> torch.Tensor:
        """The exact inverse of `rotate`; divides by cos² + sin², which RoPE scaling may make other than 1."""
        if table is None:
            return x
        cos, sin = table
        head, rest = wide(x[..., : self.width]), x[..., self.width :]
        head = (head * cos - self._quarter(head) * sin) / (cos.square() + sin.square())
        return torch.cat([head.to(x.dtype), rest], dim=-1)

    def move(self, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """x [B,H,T,D] rotated for positions `source` [B,T] → rotated for positions `target` [B,T]."""
        before, after = self.table(source), self.table(target)
        if before is None or after is None:
            return x
        return self.rotate(self.unrotate(x, _over_heads(before)), _over_heads(after))

    def magnitude(self, x: torch.Tensor) -> torch.Tensor:
        """|x| [..., D] by channel; of the rotated ones the length of their pair, which rotation leaves as it is."""
        head, rest = x[..., : self.width], x[..., self.width :]
        return torch.cat([(head.square() + self._quarter(head).square()).sqrt(), rest.abs()], dim=-1)

    def _quarter(self, x: torch.Tensor) -> torch.Tensor:
        """Each pair (a, b) turned by 90 degrees to (−b, a)."""
        if self.interleaved:
            return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)


def _over_heads(table: Table) -> Table:
    return table[0][:, None], table[1][:, None]


def _is_positions(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


NONE = Rotary(None, (), {}, 0, False)


def detect(
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]],
    rotations: list[Table | None],
    first_key: torch.Tensor,
) -> list[Rotary]:
    """One Rotary per layer.

    `calls`: every module call that returned a pair; `rotations`: the pair each attention layer was given (None
    for a layer without RoPE); `first_key` [1,K,T,D]: layer 0's keys for one token repeated T times. Raises
    InputError when neither convention makes those keys equal.
    """
    found = []
    for rotation in rotations:
        origin = next((call for call in calls if rotation is not None and call[3][0] is rotation[0]), None)
        if rotation is None or origin is None:
            found.append(NONE)
            continue
        module, args, kwargs, _ = origin
        found.append(Rotary(module, args, kwargs, rotation[0].shape[-1], False))
    doubled, interleaved = _convention(found[0], rotations[0], first_key)
    return [
        Rotary(r.module, r.args, r.kwargs, r.width * (1 + doubled), interleaved, doubled) if r.module is not None else r
        for r in found
    ]


def _convention(rotary: Rotary, rotation: Table | None, key: torch.Tensor) -> tuple[bool, bool]:
    if rotary.module is None:
        return False, False
    positions = torch.arange(key.shape[2], device=key.device)
    for doubled, interleaved in ((False, False), (False, True), (True, False)):
        width = rotary.width * (1 + doubled)
        if width > key.shape[-1]:
            continue
        trial = Rotary(rotary.module, rotary.args, rotary.kwargs, width, interleaved, doubled)
        bare = trial.unrotate(key, trial.table(positions)).float()
        spread = (bare - bare[:, :, :1]).abs().max()
        if bool(spread <= 2e-2 * bare.abs().max().clamp_min(1e-6)):
            return doubled, interleaved
    raise InputError(
        "the model's rotary embedding is of a kind that kvtool cannot undo",
        expected="half-split or interleaved pairs, or positions that enter elsewhere",
    )
