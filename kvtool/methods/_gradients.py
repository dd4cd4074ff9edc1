"""What the loss feels of a layer's key and value projections, by one backward pass a text.

    F = mean over elements of √(mean over texts of (∂loss/∂W)²),   ∂loss/∂W = Σ_t x_t g_tᵀ

x is the input of a layer's attention, g the gradient of a text's mean next-token loss (nats) at keys before RoPE, or at
values. So no weight is known by name. Where something stands between projection and key (a norm of keys), W is a
projection put behind it. `inputs` is how x is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvtool.corpus.base import Sample
from kvtool.measuring.fisher import felt
from kvtool.model import Model


@contextlib.contextmanager
def inputs(model: Model) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, by layer: what the latest pass gave to each attention, [1,T,hidden]."""
    seen: dict[int, torch.Tensor] = {}

    def note(layer: int) -> Callable[..., None]:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        return before

    hooks = [
        module.register_forward_pre_hook(note(layer), with_kwargs=True)
        for layer, module in enumerate(model.attention_modules)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def fisher(model: Model, samples: Sequence[Sample], progress: Callable[[int, int, str], None]) -> torch.Tensor:
    """fp64 [L,2]: F of each layer's keys and values."""
    squares: dict[tuple[int, int], torch.Tensor] = {}
    for done, sample in enumerate(samples, 1):
        with inputs(model) as seen:
            for layer in felt(model, sample):
                for side, gradient in enumerate((layer.k_gradient, layer.v_gradient)):
                    slope = seen[layer.layer][0].float().T @ gradient.transpose(0, 1).flatten(1).float()  # [hidden,C]
                    squares[layer.layer, side] = squares.get((layer.layer, side), 0) + slope.square()
        progress(done, len(samples), "gradients")
    means = [float((total / len(samples)).sqrt().mean()) for total in squares.values()]
    return torch.tensor(means, dtype=torch.float64).reshape(-1, 2)
