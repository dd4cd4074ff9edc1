"""The one hook through which kvtool reaches attention.

No model code is forked or patched. A cache layer that wants the attention of its model returns its keys from
`update` tagged with itself; the attention function registered here under the name `kvtool` reads the tag and calls
`layer.attend(...)`. Whatever the layer does (cache, measure, train gates) is the layer's affair. `probe` is the first
such use: it finds out shapes, sliding windows and the rotary convention by running a few tokens.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtool.errors import InputError
from kvtool.rotary import NONE, Rotary, Table, detect


@dataclass(frozen=True)
class Attention:
    """What the attention function was given in one call, shapes aside; handed to the tagged layer."""

    module: nn.Module
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None  # [H], one learned logit a head that takes part in the softmax (GPT-OSS)
    window: int | None
    padding: torch.Tensor | None  # bool [B, tokens seen + T], False where the batch is left-padded
    positions: torch.Tensor | None = None  # int64 [B|1,T], what RoPE was given, if the model passes it on
    tokens: torch.Tensor | None = None  # int64 [B,T], what the network was fed, unless it was embeddings
    given: Mapping[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # see `Step` of the cache


class Session(Cache):
    """A cache that is told when a forward of the network begins, by how many columns, and that it is over."""

    def begin(self, tokens: int) -> None:
        """A forward of so many columns begins."""

    def end(self) -> None:
        """It is over, by an error perhaps."""


class Layer(CacheLayerMixin):
    """A cache layer that takes over its layer's attention. Final classes implement `attend` and `get_seq_length`."""

    is_sliding = False

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        """q [B,H,T,D], this chunk's k and v [B,K,T,D], all post-RoPE → out [B,H,T,D]."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        key_states.kvtool_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _attention(module: nn.Module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    layer = getattr(key, "kvtool_layer", None)
    if layer is None:
        raise InputError(
            "attention 'kvtool' was called without a kvtool cache",
            remedy="pass past_key_values=SegmentCache(...), or leave the `served` context first",
        )
    unsupported = [name for name in ("position_bias", "head_mask") if kwargs.get(name) is not None]
    if unsupported:
        raise InputError(f"{type(module).__name__} passes {unsupported[0]}, which kvtool does not serve")
    call = Attention(
        module=module,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
        window=kwargs.get("sliding_window"),
        padding=attention_mask,
        positions=kwargs.get("position_ids"),
        tokens=_fed.get(),
    )
    return layer.attend(query, key, value, call).transpose(1, 2).contiguous(), None


def _mask(*, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
    """Causality is ours; of the mask only left padding matters, so hand the 2-D padding mask through."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


AttentionInterface.register("kvtool", _attention)
AttentionMaskInterface.register("kvtool", _mask)


_fed: ContextVar[torch.Tensor | None] = ContextVar("_fed", default=None)


def _note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens, cache = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
    _fed.set(tokens)
    if isinstance(cache, Session):
        cache.begin((kwargs["inputs_embeds"] if tokens is None else tokens).shape[1])


def _over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if isinstance(cache := kwargs.get("past_key_values"), Session):
        cache.end()


@contextlib.contextmanager
def served(network: Any) -> Iterator[None]:
    """Within the block the network's attention goes through kvtool, and attention learns what tokens the network is
    fed; afterwards nothing is left on it. Nesting costs nothing, and a forward within a forward leaves the outer one
    what it was fed."""
    before, fed = network.config._attn_implementation, _fed.get()
    if before == "kvtool":
        try:
            yield
        finally:
            _fed.set(fed)
        return
    network.set_attn_implementation("kvtool")
    hooks = (
        network.base_model.register_forward_pre_hook(_note, with_kwargs=True),
        network.base_model.register_forward_hook(_over, with_kwargs=True, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        network.set_attn_implementation(before)
        _fed.set(None)


@dataclass
class Probe:
    """What one attention layer showed in the probing forward: q [1,H,T,D], k and v [1,K,T,D], and its rotation."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    call: Attention
    rotary: Rotary = NONE


class _ProbeLayer(Layer):
    seen: Probe | None = None

    def attend(self, q, k, v, call):
        self.seen = Probe(q, k, v, call)
        group = q.shape[1] // k.shape[1]
        return v.repeat_interleave(group, dim=1)  # finite and of the right shape; the probe reads no logits

    def get_seq_length(self) -> int:
        return 0


def probe(network: Any, name: str) -> list[Probe]:
    """Run a few tokens through `network` and write down what each attention layer shows.

    Raises InputError when kvtool cannot serve the model.
    """
    config = network.config.get_text_config()
    layers: list[Any] = [_ProbeLayer() for _ in range(config.num_hidden_layers)]
    rotations: dict[nn.Module, Table] = {}
    pairs: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []

    def before(module, args, kwargs):
        if kwargs.get("position_embeddings") is not None:
            rotations[module] = kwargs["position_embeddings"]

    def after(module, args, kwargs, output):
        if isinstance(output, tuple) and len(output) == 2:
            pairs.append((module, args, kwargs, output))

    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in network.modules()]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in network.modules()]
    try:
        with served(network), torch.no_grad():
            token = min(5, config.vocab_size - 1)
            ids = torch.full((1, 6), token, device=network.device)
            network(input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True)
    except (InputError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} cannot be served",
            got=f"{type(network).__name__}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="a decoder whose attention goes through transformers' AttentionInterface with a KV cache",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    silent = [index for index, layer in enumerate(layers) if layer.seen is None]
    if silent:
        raise InputError(
            f"{name} cannot be served",
            got=f"layers {silent} without attention over a KV cache of their own",
            expected="attention in every layer (no state-space, linear-attention or KV-sharing layers)",
        )
    seen = [layer.seen for layer in layers if layer.seen is not None]
    found = detect(pairs, [rotations.get(record.call.module) for record in seen], seen[0].k)
    for record, rotary in zip(seen, found, strict=True):
        record.rotary = rotary
    shapes = {(p.q.shape, p.k.shape, p.v.shape) for p in seen}
    if len(shapes) > 1 or seen[0].k.shape != seen[0].v.shape:
        raise InputError(
            f"{name} cannot be served", got="head counts or widths that differ by layer or between K and V"
        )
    return seen
