"""What a scoring rule is given, and the stages that rules share.

A rule is a file with `SEES` and `score(view) -> Tensor`, higher for entries worth keeping. It sees

    "queries"   the observed queries: [B,H,S] (the pipeline reduces the GQA group)
    "entries"   keys and values alone: [B,K,S]
    "own"       each entry once, as it comes, with its own token's query: [B,K,S]; its score stays what it was then

and `NEEDS`, if it looks at the entries' "positions" or "tokens", which are remembered only then; `RECALLS`, if a decode
step leaves something for the next one in `view.memory`, and is scored whether anything is to leave or not;
`quiet(spec, tokens)`, if the tokens held, int64 [B,K,S], tell that a decode step changes no score; and `shift` or
`blend`, and `PAST`, where a decode step can be one operation (see `fused.py`).

    p_ij = softmax_j(scale · q_i · k_j / τ) over the entries that query i sees;   s_j = reduce_i f(p_ij)

Queries come a block at a time, so no N×S matrix is held; `paid` goes through many of them KV head by KV head, so that a
block stays in the cache of a core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING
from zlib import crc32

import torch

from kvtool.rotary import NONE, Rotary
from kvtool.slots import Select
from kvtool_kernels.precision import wide

if TYPE_CHECKING:
    from kvtool.cache.keep.memo import Account

BLOCK = 64  # query rows at a time
Noise = Callable[[torch.Size], torch.Tensor]


@dataclass(frozen=True)
class View:
    """k, v [B,K,S,D] post-RoPE, the entries held, in order; q [B,H,N,D] the observed queries, which stand at the places
    `rows` int64 [N] among them, in order. A query sees entries up to its own place.

    layer, heads: where the K heads are in the model; turn: how often these entries were scored before.
    tags: int64 [B,K,S], the entries' "positions" (what RoPE was given) and "tokens", for rules that need them.
    rotary: the layer's rotation. memory: what rules keep from one call to the next, tensors [B,...] of their own
    naming. logits: q·k of the only query, scaled and capped, [B,H,1,S], where they are known. account: what payments
    are shared through (`memo.py`), if they are; a view that is made from this one has none.
    """

    q: torch.Tensor
    rows: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    softcap: float | None
    spec: Select
    layer: int
    heads: list[int]
    turn: int = 0
    tags: dict[str, torch.Tensor] = field(default_factory=dict)
    rotary: Rotary = NONE
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    account: Account | None = field(default=None, init=False)

    def table(self, name: str) -> torch.Tensor:
        """What the rule was calibrated with, of this layer."""
        return self.spec.tables[name][self.layer].to(self.k.device)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def paid(self) -> torch.Tensor:
        """reduce_i p_ij, fp32 [B,H,S]: what the observed queries pay each entry; computed once for all who ask."""
        if self.account is None:
            return paid(self)
        return self.account.paid(self.spec, len(self.rows), self.layer, self.heads, lambda: paid(self))

    def shared(self, account: Account | None) -> View:
        """This view, whose payments are shared with other caches' through `account`, if there is one."""
        object.__setattr__(self, "account", account)
        return self

    def alone(self, head: int) -> View:
        """One of the KV heads, and the queries of its group."""
        own, group = slice(head, head + 1), slice(head * self.group, (head + 1) * self.group)
        tags = {name: tag[:, own] for name, tag in self.tags.items()}
        k, v = self.k[:, own], self.v[:, own]
        return replace(self, q=self.q[:, group], k=k, v=v, heads=[self.heads[head]], tags=tags)

    def draws(self) -> list[torch.Generator]:
        """A source of noise per KV head, which depends neither on the batch nor on how heads share lanes."""
        names = [f"{self.spec.seed} {self.layer} {head} {self.turn}" for head in self.heads]
        return [torch.Generator().manual_seed(crc32(name.encode())) for name in names]  # it heeds 32 bits only


def paid(view: View, noisy: Callable[[View], Noise] | None = None) -> torch.Tensor:
    """reduce_i p_ij, fp32 [B,H,S]. noisy: of a view, what is added to a block's logits, given their shape."""
    if view.k.shape[1] > 1 and len(view.rows) > BLOCK:
        return torch.cat([paid(view.alone(head), noisy) for head in range(view.k.shape[1])], dim=1)
    return reduced(view, (p for _, p in visible(view, None if noisy is None else noisy(view))))


def probabilities(view: View) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A block of the observed queries at a time: their places [n], and p [B,H,n,S], 0 where nothing is seen."""
    for rows, p in visible(view):
        yield rows, torch.nn.functional.pad(p, (0, view.k.shape[2] - p.shape[-1]))


def visible(view: View, noise: Noise | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As `probabilities`, but p ends with the last entry that a query of the block sees.

    noise: what is added to a block's logits, given their shape."""
    for rows, logits in hot(view, noise):
        written = logits is not view.logits and not logits.requires_grad
        yield rows, torch.softmax(logits, -1, out=logits if written else None)


def hot(view: View, noise: Noise | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What `visible` is the softmax of: logits ÷ τ, −inf where nothing is seen."""
    heat = view.spec.temperature + view.spec.warming * view.turn
    if view.logits is not None:  # of the newest query, which sees all
        logits = view.logits if noise is None else view.logits + noise(view.logits.shape).to(view.logits)
        yield view.rows, logits if heat == 1 else logits / heat
        return
    keys, kv_heads = wide(view.k).mT, view.k.shape[1]
    for low in range(0, view.q.shape[2], BLOCK):
        rows = view.rows[low : low + BLOCK]
        first, end = int(rows[0]) + 1, min(int(rows[-1]) + 1, view.k.shape[2])
        q = view.scale * wide(view.q[:, :, low : low + BLOCK])
        logits = q.reshape(len(q), kv_heads, -1, q.shape[-1]) @ keys[..., :end]
        logits = logits.reshape(*q.shape[:3], end)
        if view.softcap is not None:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        if noise is not None:
            logits += noise(logits.shape).to(logits)
        if heat != 1:
            logits = logits / heat
        if first < end:
            hidden = torch.arange(first, end, device=logits.device) > rows[:, None]
            logits[..., first:].masked_fill_(hidden, float("-inf"))
        yield rows, logits


def reduced(view: View, blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    """Blocks [B,H,n,≤S] of all observed queries, 0 where nothing is seen → [B,H,S], as `Select.reduce` says."""
    spec, entries = view.spec, view.k.shape[2]
    if len(view.rows) == 1:  # its sum, mean and maximum are itself, and nothing varies
        (only,) = blocks
        unseen = entries - only.shape[-1]
        return torch.nn.functional.pad(only[:, :, 0], (0, unseen)) if unseen else only[:, :, 0]
    total, squares, best = torch.zeros(3, 1, 1, 1, dtype=wide(view.k).dtype, device=view.k.device).unbind(0)
    for p in blocks:
        lacking = (0, entries - p.shape[-1])
        total = total + torch.nn.functional.pad(p.sum(2), lacking)
        if spec.variance:
            squares = squares + torch.nn.functional.pad(p.square().sum(2), lacking)
        if spec.reduce == "max":
            best = torch.maximum(best, torch.nn.functional.pad(p.amax(2), lacking))
    columns = torch.arange(entries, device=total.device)
    seen = (len(view.rows) - torch.searchsorted(view.rows, columns)).clamp_min(1)
    out = best if spec.reduce == "max" else total / seen if spec.reduce == "mean" else total
    if spec.variance:
        out = out + spec.variance * (squares - total.square() / seen).clamp_min(0) / (seen - 1).clamp_min(1)
    return out
