"""Answers sampled through gates, how probable they are, and what a group of them teaches.

    o = α · full + (1 − α) · window        per KV head, both over the same cached keys and values

    advantage  A = (r − mean r) / (std r + ε)                    over the samples of one prompt
    surrogate  mean over samples and tokens of min(ρ·A, clip(ρ, 1 − c, 1 + c)·A),   ρ = p / p when sampled

(GRPO without a KL term: Shao et al., arXiv 2402.03300, section 4.1.)

The samples of a prompt share its prefill: `prefill` runs it once, as one row, and the tokens of each sample attend to
it and to what that sample has written. `sample` draws answers, `log_probabilities` runs written ones, differentiable
in α through prompt and answer alike. Both take one path, so their gates and masks cannot differ.

It knows nothing of rewards or schedules; methods own those. Full and windowed attention are both computed over
everything: nothing here saves memory or time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from kvtool.measuring import gates
from kvtool.model import Model
from kvtool.serving import Attention, Layer

EPSILON = 1e-4  # keeps the advantages of nearly equal rewards bounded


class _Shared(Layer):
    """Keys and values of one prompt [1,K,n,D], and of what each of B samples wrote after it [B,K,a,D]."""

    prompt: tuple[torch.Tensor, torch.Tensor] | None = None
    written: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, alpha: torch.Tensor, sink: int, recent: int):
        super().__init__()
        self.alpha, self.sink, self.recent = alpha, sink, recent

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        vars(k).pop("kvtool_layer", None)  # read by now; what is kept here must not keep this layer in turn
        if self.prompt is None:
            self.prompt = (k, v)
            return gates.mixture(q, k, v, call, self.alpha, sink=self.sink, recent=self.recent)
        if self.written is not None:
            k, v = torch.cat([self.written[0], k], dim=2), torch.cat([self.written[1], v], dim=2)
        self.written = (k, v)
        return self._answer(q, k, v, call)

    def _answer(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        """q [B,H,T,D] of the newest T positions; k and v [B,K,a,D] of all that is written."""
        assert self.prompt is not None
        told = self.prompt[0].shape[2]
        rows = q.unflatten(1, (k.shape[1], -1))  # [B,K,G,T,D]
        ahead, own = (
            torch.einsum("bkgtd,ksd->bkgts", rows, self.prompt[0][0]),
            torch.einsum("bkgtd,bksd->bkgts", rows, k),
        )
        logits = torch.cat([ahead, own], dim=-1).float() * call.scale
        column = torch.arange(told + k.shape[2], device=q.device)
        row = column[-q.shape[2] :, None]
        seen = column <= row
        if call.window is not None:  # a layer with a window of its own is not gated
            weights = _softmax(logits, seen & (column > row - call.window))
        else:
            weights = _softmax(logits, seen & ((column < self.sink) | (column > row - self.recent)))
            weights = weights + self.alpha[:, None, None, None] * (_softmax(logits, seen) - weights)
        weights = weights.to(q.dtype)
        out = torch.einsum("bkgts,ksd->bkgtd", weights[..., :told], self.prompt[1][0])
        return (out + torch.einsum("bkgts,bksd->bkgtd", weights[..., told:], v)).flatten(1, 2)

    def get_seq_length(self) -> int:
        return sum(0 if part is None else part[0].shape[2] for part in (self.prompt, self.written))


def _softmax(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits.masked_fill(~seen, float("-inf")), dim=-1)


def prefill(model: Model, prompt: torch.Tensor, alpha: torch.Tensor, *, sink: int, recent: int) -> Cache:
    """The prompt int64 [T] but for its last token, which starts every answer; alpha fp32 [L,K]."""
    layers: list[Any] = [_Shared(row, sink, recent) for row in alpha]
    cache = Cache(layers=layers)
    with model.served():
        model.network.base_model(input_ids=prompt[None, :-1].to(model.device), past_key_values=cache)
    return cache


def sample(
    model: Model,
    cache: Cache,
    last: int,
    *,
    samples: int,
    steps: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers of `steps` tokens after the prompt's token `last`: int64 [samples,steps], and the log-probabilities
    fp32 that they were drawn with. Temperature 0 is greedy; else `generator`, on the CPU, draws. Stops are not
    heeded."""
    token, tokens, logs = torch.full((samples, 1), last), [], []
    _fresh(cache)
    with torch.no_grad():
        for _ in range(steps):
            law = _law(model, cache, token, temperature)[:, -1].cpu()
            token = torch.multinomial(law.exp(), 1, generator=generator) if temperature else law.argmax(-1, True)
            tokens.append(token)
            logs.append(law.gather(1, token))
    return torch.cat(tokens, dim=1), torch.cat(logs, dim=1)


def log_probabilities(
    model: Model, cache: Cache, last: int, answers: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """fp32 [B,A] of answers int64 [B,A] after the prompt's token `last`."""
    _fresh(cache)
    fed = torch.cat([torch.full((len(answers), 1), last), answers[:, :-1]], dim=1)
    law = _law(model, cache, fed, temperature)
    return law.gather(2, answers.to(law.device)[..., None])[..., 0]


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards fp32 [B] of one prompt's samples, normalised within the group."""
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + EPSILON)


def surrogate(logs: torch.Tensor, before: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """What GRPO maximises: logs and before fp32 [B,A], advantage fp32 [B]."""
    ratio, each = (logs - before).exp(), advantage[:, None]
    return torch.minimum(ratio * each, ratio.clamp(1 - clip, 1 + clip) * each).mean()


def _fresh(cache: Cache) -> None:
    """Forget what was written after the prompt."""
    for layer in cache.layers:
        assert isinstance(layer, _Shared)
        layer.written = None


def _law(model: Model, cache: Cache, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities fp32 [B,T,V] of what follows tokens int64 [B,T]."""
    with model.served():
        logits = model.network(input_ids=tokens.to(model.device), past_key_values=cache).logits
    return torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
