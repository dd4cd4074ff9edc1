"""A prompt whose answer stands in it, decoded greedily: what every token that comes looks at, in every layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvtool.corpus.base import Sample
from kvtool.dense import plain
from kvtool.model import Model
from kvtool.observing.watch import Watch
from kvtool.serving import Attention, Layer
from kvtool.statistics._base import Copying
from kvtool_kernels.attend.reference import logits

MOST = 50  # tokens generated for a prompt with an answer


def copying(model: Model, sample: Sample, watch: Watch) -> torch.Tensor:
    """Greedy decode of the sample's prompt, one observation a step; stops at a stop token or after the answer's
    length + 2."""
    layers: list[Any] = [_Copier() for _ in range(model.geometry.layers)]
    cache = Cache(layers=layers)
    tokens = sample.tokens[None].to(model.device)
    if tokens.shape[1] > 1:
        model.network.base_model(input_ids=tokens[:, :-1], past_key_values=cache)
    token, answer = tokens[:, -1:], []
    limit = MOST if sample.answer is None else min(MOST, len(sample.answer) + 2)
    for _ in range(limit):
        logits = model.network(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        attention = torch.stack([layer.row for layer in layers])
        watch.all("step", Copying(attention, int(token), tokens[0]))
        answer.append(int(token))
        if int(token) in _stop_tokens(model):
            break
    return torch.tensor(answer)


class _Copier(Layer):
    """Full cache of one sequence that keeps the last row's attention [H,S] of the latest one-token step."""

    def __init__(self) -> None:
        super().__init__()
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.row = torch.empty(0)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        if self.held is not None:
            k, v = torch.cat([self.held[0], k], dim=2), torch.cat([self.held[1], v], dim=2)
        self.held = (k, v)
        if q.shape[2] > 1:
            return plain(q, k, v, call)
        seen = logits(q.float(), k.float(), scale=call.scale, softcap=call.softcap)[0, :, 0]
        if call.window is not None:
            seen[:, : max(0, k.shape[2] - call.window)] = float("-inf")
        sink = (
            call.sink_logits.float()[:, None]
            if call.sink_logits is not None
            else seen.new_full((len(seen), 1), float("-inf"))
        )
        self.row = torch.softmax(torch.cat([seen, sink], dim=1), dim=1)[:, :-1]
        out = self.row.unflatten(0, (k.shape[1], -1)) @ v[0].float()
        return out.flatten(0, 1)[None, :, None].to(q.dtype)

    def get_seq_length(self) -> int:
        return 0 if self.held is None else self.held[0].shape[2]


def _stop_tokens(model: Model) -> set[int]:
    """Ids that end a generation."""
    stop = getattr(model.network.generation_config, "eos_token_id", None)
    return set() if stop is None else set(stop if isinstance(stop, Iterable) else [stop])
