"""Exact rotation and inverse rotation of keys and queries, in whatever convention the model uses.

The rotation tables come from the model's own rotary module, so every RoPE scaling rule is its own. Which channels
pair up (half-split or interleaved) and how many are rotated is found by a test: in layer 0 the same token at two
positions must have the same key once its rotation is undone.

Some scaling rules (dynamic NTK, LongRoPE) turn all positions otherwise once a text is longer than some length. A key
that was written before stays as it was turned then, so nobody can tell from its position how to turn it back. Up to
that length, which is found by a test too, angles belong to positions and everything here is exact; beyond it `table`
raises InputError, unless it is asked for a text that was fed at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from kvtool.errors import InputError
from kvtool_kernels.precision import wide

Table = tuple[torch.Tensor, torch.Tensor]
Tables = dict[tuple[object, ...], Table]
FAR = 2**22  # tokens that no text has


@dataclass(frozen=True)
class Rotary:
    """One layer's RoPE. `module` is None for a layer without one; then every method is the identity."""

    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    width: int  # how many of the head's first channels are rotated
    interleaved: bool
    doubled: bool = False  # the module gives each angle once (GPT-OSS), not once a channel
    tables: Tables | None = field(default=None, compare=False, repr=False)  # by kind, and place, for who shares them
    steady: int | None = None  # up to how many tokens angles belong to positions alone; None: always
    short: dict[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)  # the module's buffers then

    @property
    def kind(self) -> tuple[object, ...]:
        """Layers of the same kind have the same tables."""
        fixed = (*self.args, *self.kwargs.values())
        return (id(self.module), *(str(value) for value in fixed if not isinstance(value, torch.Tensor)))

    def table(self, positions: torch.Tensor, *, at_once: bool = False) -> Table | None:
        """positions int64 [...] → (cos, sin) fp32 [..., width], scaling factors included.

        at_once: they are all of a text that the network is being fed in one call."""
        if self.module is None:
            return None
        if self.steady is not None and not at_once:
            self._check(self.steady, positions)
        return self._angles(positions)

    def _check(self, steady: int, positions: torch.Tensor) -> None:
        """Raise InputError if keys were turned, or would be, as only a long text's are."""
        assert self.module is not None
        buffers = dict(self.module.named_buffers())
        long = any(not torch.equal(buffers[name], held.to(buffers[name])) for name, held in self.short.items())
        if long or (positions.numel() and int(positions.max()) >= steady):
            raise InputError(
                "in longer texts this model's RoPE turns keys otherwise, and what came before cannot be turned back",
                got="a longer text", expected=f"{steady} tokens or fewer",
                remedy="use a plan that holds keys after RoPE and leaves them where they are",
            )  # fmt: skip

    def _angles(self, positions: torch.Tensor) -> Table:
        assert self.module is not None
        flat = positions.reshape(1, -1)
        args = tuple(flat if _is_positions(value) else value for value in self.args)
        kwargs = {name: flat if _is_positions(value) else value for name, value in self.kwargs.items()}
        with torch.no_grad():
            cos, sin = self.module(*args, **kwargs)
        if self.doubled:
            cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        return cos[0].float().reshape(*positions.shape, -1), sin[0].float().reshape(*positions.shape, -1)

    def bounded(self) -> Rotary:
        """The same, with `steady` found by bisection: the least length whose angles at one place are others."""
        if self.module is None:
            return self

        def alike(last: int) -> bool:
            far = self._angles(torch.tensor([1, last], device=device))
            near = self._angles(torch.tensor([1], device=device))  # last: it leaves the module as a short text does
            return all(torch.equal(a, b[:1]) for a, b in zip(near, far, strict=True))

        device = next(x.device for x in (*self.args, *self.kwargs.values()) if _is_positions(x))
        if alike(FAR):
            return self
        low, high = 1, FAR
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if alike(middle) else (low, middle)
        short = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        return replace(self, steady=high, short=short)

    def rows(self, count: int, device: torch.device) -> Table:
        """(cos, sin) fp32 [count, width/2] of positions 0 … count − 1, once a pair."""
        if self.module is None:
            nothing = torch.ones(count, 0, dtype=torch.float32, device=device)
            return nothing, nothing
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
        before, after = self._near(source), self._near(target)
        if before is None or after is None:
            return x
        return self.rotate(self.unrotate(x, _over_heads(before)), _over_heads(after))

    def _near(self, positions: torch.Tensor) -> Table | None:
        """As `table`; of one position it is computed once for all layers that share tables."""
        if self.module is None or self.tables is None or positions.numel() != 1 or positions.is_cuda:
            return self.table(positions)
        name = (*self.kind, int(positions))
        made = self.tables.get(name) or self.table(positions)
        if made is not None:
            self.tables[name] = made
        return made

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
    turned = [
        Rotary(r.module, r.args, r.kwargs, r.width * (1 + doubled), interleaved, doubled) if r.module is not None else r
        for r in found
    ]
    bounded = {rotary.kind: rotary.bounded() for rotary in turned}
    return [replace(r, steady=bounded[r.kind].steady, short=bounded[r.kind].short) for r in turned]


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
