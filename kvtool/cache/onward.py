"""Tokens of a prompt that leave the forward: later layers run for those alone that a plan lets go on.

    behind layer l − 1:   s_j = mean over heads of a rule's score of token j, by the prompt's last queries
    the best of them reach layer l, as many as `Keep.onward` says, the last ones always; in order, at their own places
    of the call of layer l, and of all behind it, hidden states, positions and rotations of the others are taken out

What such a layer does costs as many tokens as reach it, and its cache holds no others. The network's last layer puts
out the states of what is left, the last token's at the end. The forward is changed by hooks on the decoder layers,
which are there for this one call only. It acts on what a fresh cache is fed first, which has to be the whole prompt;
everything later goes through all layers. Rows of a batch choose alone; those that keep fewer are padded on the left.

It knows no method, and of models only that decoder layers take hidden states first, and tokens along axis 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kvtool.cache.keep.selector import Selector
from kvtool.cache.lane import Step
from kvtool.cache.part import Part
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.slots import Select


@dataclass(frozen=True)
class Going:
    """The tokens that go on, of a call of `width` columns whose rows have `padding`: their columns int64 [B,N]; rows
    with fewer than N begin with column 0, which is padding."""

    index: torch.Tensor
    width: int
    padding: list[int]

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        """x [B|1,width,...] → [B,N,...]."""
        return _rows(x.expand(len(self.index), *x.shape[1:]), self.index)

    def places(self, row: int, skip: int) -> torch.Tensor:
        """Where a row's tokens stand, counted from its first, int64; `skip`: how many columns are padding now."""
        return self.index[row, skip:].cpu() - self.padding[row]


@dataclass
class Onward:
    """Of one cache. `spec.budget` [L,K]: how many of a prompt's tokens reach each layer; `expected`: columns of the
    prompt, where they are known."""

    model: Model
    spec: Select
    expected: int | None
    going: Going | None = None  # in the call that is under way
    active: bool = False
    fresh: torch.Tensor | None = None  # int64 [B,N]: of the tokens that reached this layer, those that reach the next
    hooks: list[RemovableHandle] = field(default_factory=list)

    def begin(self, tokens: int, before: int, finished: bool) -> None:
        """A call of so many columns begins, on a cache that was fed so many `before`."""
        self.end()
        chunk = not finished and tokens > 1 if before else self.expected not in (None, tokens)
        if chunk:
            raise InputError(
                "tokens leave the forward by what the prompt's last ones look at, but it comes in chunks",
                got=f"{tokens} tokens after {before}", expected=self.expected,
                remedy="feed the prompt at once, and call finish() before anything longer than a token follows",
            )  # fmt: skip
        if before or tokens == 1:
            return
        self.active = True
        layers = self._layers()
        first = next(layer for layer in range(len(layers)) if self._acts(layer))
        self.hooks = [layer.register_forward_pre_hook(self._narrow, with_kwargs=True) for layer in layers[first:]]

    def end(self) -> None:
        """The call is over, or broke off."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.active, self.going, self.fresh = [], False, None, None

    def choose(
        self, layer: int, parts: list[Part], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step
    ) -> None:
        """Behind `layer`, which attended with q [B,H,T,D] to k, v [B,K,T,D]; parts of one row each. step: of all."""
        if not self.active or not self._acts(layer + 1):
            return
        width = q.shape[2] if self.going is None else self.going.width
        padding = [0] * len(q) if self.going is None else list(self.going.padding)
        kept: dict[int, torch.Tensor] = {}
        for part in parts:
            (row,) = part.rows
            padding[row] = part.padding if self.going is None else padding[row]
            at = (slice(row, row + 1), slice(None), slice(part.padding, None))
            kept[row] = part.padding + self._best(layer, width - padding[row], q[at], k[at], v[at], part, step)
        most = max(len(index) for index in kept.values())
        fresh = torch.zeros(len(q), most, dtype=torch.long, device=q.device)
        for row, index in kept.items():
            fresh[row, most - len(index) :] = index
        self.fresh = fresh
        self.going = Going(fresh if self.going is None else self.going.index.gather(1, fresh), width, padding)

    def _best(
        self, layer: int, length: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Part, step: Step
    ) -> torch.Tensor:
        """Of one row's tokens here, [1,·,T,D], of `length` in all, those that go on, in order, int64 [N]."""
        heads, rotary = list(range(k.shape[1])), self.model.rotary(layer)
        reach = [float(self.spec.budget[layer + 1, 0])] * len(heads)
        selector = Selector(self.spec, reach, layer, heads, length, rotary)
        tags = self._tags(part, k, step)
        selector.observe(q, 0, k, v, step, tags)
        view = selector.view(k, v, step, tags)
        scores = selector.scores(view)
        free = selector.free(k.shape[2])
        count = min(k.shape[2], max(selector.limits(length)[0], k.shape[2] - free.stop + free.start))
        return selector.choose(view, scores, count, scores)[0, 0]

    def _tags(self, part: Part, k: torch.Tensor, step: Step) -> dict[str, torch.Tensor]:
        """Positions and tokens of one row, int64 [1,K,T]."""
        (row,), shape = part.rows, (1, k.shape[1], -1)
        here = torch.arange(k.shape[2]) if self.going is None else self.going.places(row, part.padding)
        tags = {"positions": here.to(k.device).expand(shape) + part.origin}
        if step.tokens is not None:
            tags["tokens"] = step.tokens[row, part.padding :].to(k.device).expand(shape)
        return tags

    def _acts(self, layer: int) -> bool:
        """Do fewer tokens reach this layer than the one before?"""
        budget = self.spec.budget[:, 0]
        return 0 < layer < len(budget) and bool(budget[layer] != budget[layer - 1])

    def _layers(self) -> list[nn.Module]:
        """The decoder layers, each of which must stand in the network's own list of them."""
        found = self.model.decoder_layers
        for listed in self.model.network.modules():
            if isinstance(listed, nn.ModuleList) and [*listed][: len(found)] == found:
                return found
        raise InputError(
            "tokens cannot leave this model's forward", got=type(self.model.network).__name__,
            expected="attention modules that stand in decoder layers, and these in one list",
        )  # fmt: skip

    def _narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a decoder layer is called with, for those alone that go on."""
        if self.going is None:
            return None
        args, kwargs = tuple(args), dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self.fresh is not None:
            hidden, self.fresh = _rows(hidden, self.fresh), None
        return (hidden, *(self._cut(x) for x in args[1:])), {name: self._cut(x) for name, x in kwargs.items()}

    def _cut(self, value: Any) -> Any:
        """Whatever a decoder layer is told of all tokens, of those that go on."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._cut(x) for x in value)
        assert self.going is not None
        width = self.going.width
        if not isinstance(value, torch.Tensor) or width not in value.shape:
            return value
        if value.dim() > 1 and value.shape[1] == width and value.shape[0] in (1, len(self.going.index)):
            return self.going.taken(value)
        raise InputError(
            "tokens cannot leave this model's forward", got=f"decoder layers that are given {list(value.shape)}",
            expected="tokens along axis 1 of whatever they are given",
        )  # fmt: skip


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B,T,...], int64 index [B,N] → [B,N,...]."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index.to(x.device)]
