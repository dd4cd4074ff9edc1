"""What a change of one layer's attention output does to a model's predictions, to second order.

    KL(p ‖ p̂) ≈ ½ · E_y ( Σ_t g_t·δ_t )²,   g_t = ∂ Σ log p(y) / ∂ o_t,   y ~ p        (δ a change of the outputs o)
              ≈ ½ · E_y Σ_t (g_t·δ_t)²       if the changes of different tokens are unrelated

E g gᵀ is the Fisher information of the outputs, so a few backward passes over answers drawn from the model itself
price every change of every layer, head by head, and one forward pass serves all encodings that are weighed. δ is not
linearised: it is what decode steps would compute over encoded entries, with the raw sinks and recent entries that a
store leaves. What is linear is the rest of the network, so large changes are priced too high or too low, and changes
that repeat from token to token, as those of a low rank do, too low: compare with `divergence.py`.

Shapes: H query heads, K KV heads, G = H/K, T tokens decoded after a prompt, S entries (the prompt and they), D head
dim, M draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from kvtool.corpus.base import Sample
from kvtool.dense import plain
from kvtool.encoding.encoding import Encoding
from kvtool.model import Model
from kvtool.rotary import Rotary
from kvtool.serving import Attention, Layer
from kvtool_kernels.attend.reference import logits

Side = Literal["keys", "values"]


@dataclass(frozen=True)
class View:
    """One layer without a window of its own while `T` tokens are decoded: q, out [H,T,D], k and v [K,S,D] after RoPE,
    gradient [M,H,T,D], the weights [H,T,S] of attention."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    gradient: torch.Tensor
    weights: torch.Tensor
    call: Attention
    rotary: Rotary

    def coded(self, sink: int, recent: int, block: int) -> torch.Tensor:
        """bool [T,S]: which entries a decode step finds encoded."""
        entries = torch.arange(self.k.shape[1], device=self.k.device)
        before = entries[-self.q.shape[1] :]  # tokens that a step's own comes after
        count = (before - sink - recent).clamp_min(0) // block * block
        return (entries >= sink) & (entries < sink + count[:, None])

    def change(self, side: Side, encoding: Encoding, coded: torch.Tensor) -> torch.Tensor:
        """δ fp32 [H,T,D] when `coded` entries of this side are as the encoding gives them back."""
        return changes([self], side, encoding, coded)[0]

    def side(self, side: Side) -> torch.Tensor:
        return self.k if side == "keys" else self.v

    def after(self, side: Side, back: torch.Tensor, coded: torch.Tensor) -> torch.Tensor:
        """δ when this side is `back` fp32 [K,S,D] where `coded`."""
        if side == "values":
            return self._weighted(self.weights * coded, back - self.v.float())
        logits = torch.where(coded, _logits(self.q, back, self.call), _logits(self.q, self.k, self.call))
        return self._weighted(_softmax(logits, self.call) - self.weights, self.v)

    def felt(self, coded: torch.Tensor) -> torch.Tensor:
        """What an error of a logit of a coded entry costs: mean over draws, sum over tokens and entries of
        (w_j g·(v_j − o))², the slope of log p in that logit, fp64 [K]; entries' errors taken to be unrelated."""
        values = self.v.float()[:, None]  # [K,1,S,D]
        gradient = self.gradient.unflatten(1, (len(self.v), -1))  # [M,K,G,T,D]
        own = (gradient * self.out.unflatten(0, (len(self.v), -1))).sum(-1, keepdim=True)
        slope = (gradient @ values.mT - own) * (self.weights * coded).unflatten(0, (len(self.v), -1))
        return slope.double().square().sum((2, 3, 4)).mean(0)

    def _weighted(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[H,T,S], [K,S,D] → [H,T,D]"""
        return (weights.unflatten(0, (len(values), -1)) @ values.float()[:, None]).flatten(0, 1)

    def effect(self, change: torch.Tensor) -> torch.Tensor:
        """δ [H,T,D] → KL in nats a token, fp64 [K]: each KV head's query heads changed alone."""
        kv_heads = len(self.k)
        each = (self.gradient * change).unflatten(1, (kv_heads, -1)).sum((2, 4))  # [M,K,T]
        return each.double().square().mean((0, 2)) / 2

    def size(self, change: torch.Tensor) -> torch.Tensor:
        """δ [H,T,D] → ‖δ‖² of each KV head's query heads over ‖o‖² of the layer, fp64 [K]."""
        squares = change.double().square().unflatten(0, (len(self.k), -1)).sum((1, 2, 3))
        return squares / self.out.double().square().sum()


def changes(views: Sequence[View], side: Side, encoding: Encoding, coded: torch.Tensor) -> list[torch.Tensor]:
    """As `View.change`, of each of these layers, which are written as one with all their heads."""
    used = coded.any(0).nonzero().flatten()
    if not len(used):
        return [torch.zeros_like(view.out) for view in views]
    low, high = int(used[0]), int(used[-1]) + 1  # whole blocks, since `coded` counts them so
    x = torch.cat([view.side(side)[None, :, low:high] for view in views], dim=1)
    found = []
    for view, own in zip(views, _through(x, encoding, side, views[0].rotary, low)[0].chunk(len(views)), strict=True):
        back = view.side(side).float().clone()
        back[:, low:high] = own
        found.append(view.after(side, back, coded))
    return found


def _through(x: torch.Tensor, encoding: Encoding, side: Side, rotary: Rotary, first: int) -> torch.Tensor:
    """x [1,K,S,D], K of one layer or of several, from position `first` on, encoded and decoded again, fp32."""
    if side == "values" or encoding.rotated:
        return encoding.decode(encoding.encode(x), x.shape[-1]).float()
    table = rotary.table(torch.arange(first, first + x.shape[2], device=x.device))
    bare = rotary.unrotate(x, table)
    return rotary.rotate(encoding.decode(encoding.encode(bare), x.shape[-1]).to(x.dtype), table).float()


def _logits(q: torch.Tensor, k: torch.Tensor, call: Attention) -> torch.Tensor:
    """q [H,T,D] of the newest tokens, k [K,S,D] → fp32 [H,T,S], −inf where a token cannot see."""
    found = logits(q[None].float(), k[None].float(), scale=call.scale, softcap=call.softcap)[0]
    column = torch.arange(k.shape[1], device=k.device)
    row = column[-q.shape[1] :, None]
    hidden = column > row
    if call.window is not None:
        hidden = hidden | (column <= row - call.window)
    return found.masked_fill(hidden, float("-inf"))


def _softmax(logits: torch.Tensor, call: Attention) -> torch.Tensor:
    if call.sink_logits is None:
        return torch.softmax(logits, dim=-1)
    extra = call.sink_logits.to(logits)[:, None, None].expand(*logits.shape[:2], 1)
    return torch.softmax(torch.cat([logits, extra], dim=-1), dim=-1)[..., :-1]


class _Watched(Layer):
    """The prompt's keys and values, then one differentiable chunk after it; `probe` is added to its output."""

    prompt: tuple[torch.Tensor, torch.Tensor] | None = None
    seen: tuple[torch.Tensor, ...] = ()
    call: Attention | None = None
    probe: torch.Tensor

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        vars(k).pop("kvtool_layer", None)  # read by now; what is kept here must not keep this layer in turn
        if self.prompt is None:
            self.prompt = (k, v)
            return plain(q, k, v, call)
        k, v = torch.cat([self.prompt[0], k], dim=2)[0], torch.cat([self.prompt[1], v], dim=2)[0]
        weights = _softmax(_logits(q[0], k, call), call)
        out = (weights.unflatten(0, (len(k), -1)) @ v.float()[:, None]).flatten(0, 1)
        self.probe = torch.zeros_like(out, requires_grad=True)
        self.call, self.seen = call, tuple(x.detach() for x in (q[0], k, v, out, weights))
        return (out + self.probe)[None].to(q.dtype)

    def get_seq_length(self) -> int:
        return 0 if self.prompt is None else self.prompt[0].shape[2]


def views(model: Model, sample: Sample, *, draws: int, seed: int = 0) -> dict[int, View]:
    """By layer, those with a window of their own left out: the prompt `sample.tokens` is prefilled, `sample.answer` is
    decoded after it, and `draws` other answers are drawn at its places for the gradients."""
    assert sample.answer is not None
    layers: list[Any] = [_Watched() for _ in range(model.geometry.layers)]
    cache, ids = Cache(layers=layers), sample.tokens[None].to(model.device)
    fed = torch.cat([sample.tokens[-1:], sample.answer[:-1]])[None].to(model.device)
    with model.served():
        with torch.no_grad():
            model.network.base_model(input_ids=ids[:, :-1], past_key_values=cache)
        with torch.enable_grad():
            logs = model.network(input_ids=fed, past_key_values=cache).logits[0].float().log_softmax(-1)
            gradients = _gradients(logs, [layer.probe for layer in layers], draws, seed)
    found = {}
    for index, window in enumerate(model.geometry.windows):
        if window is None:
            q, k, v, out, weights = layers[index].seen
            call, rotary = layers[index].call, model.rotary(index)
            found[index] = View(q, k, v, out, gradients[index], weights, call, rotary)
    return found


def _gradients(logs: torch.Tensor, probes: list[torch.Tensor], draws: int, seed: int) -> list[torch.Tensor]:
    """logs [T,V] → by probe [M,H,T,D]: ∂ Σ_t log p(y_t) / ∂ probe for answers y drawn from p."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.multinomial(logs.detach().exp().cpu(), draws, replacement=True, generator=generator).to(logs.device)
    rows = []
    for draw in range(draws):
        total = logs.gather(1, answers[:, draw, None]).sum()
        rows.append(torch.autograd.grad(total, probes, retain_graph=draw + 1 < draws))
    return [torch.stack(each).float() for each in zip(*rows, strict=True)]
