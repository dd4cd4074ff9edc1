"""The residual stream of a model that runs: hooks on its decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvtool.model import Model


def stream_hooks(model: Model, tell: Callable[[str, int, torch.Tensor, torch.Tensor], None]) -> list[Any]:
    """Hooks that tell of each layer's residual stream, [B,T,hidden], before and after its attention ("attended") and
    the whole layer ("stream")."""
    seen: dict[int, torch.Tensor] = {}
    hooks = []

    for index, (layer, attention) in enumerate(zip(model.decoder_layers, model.attention_modules, strict=True)):

        def before(module, args, kwargs, index=index):
            seen[index] = args[0] if args else kwargs["hidden_states"]

        def middle(module, args, output, index=index, layer=layer):
            out = output[0] if isinstance(output, tuple) else output
            if hasattr(layer, "pre_feedforward_layernorm"):  # sandwich norms: the residual adds the normed output
                out = layer.post_attention_layernorm(out)
            tell("attended", index, seen[index], seen[index] + out)

        def after(module, args, output, index=index):
            out = output[0] if isinstance(output, tuple) else output
            tell("stream", index, seen.pop(index), out)

        hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            attention.register_forward_hook(middle),
            layer.register_forward_hook(after),
        ]
    return hooks
