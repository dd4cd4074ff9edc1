"""Answers sampled through gates: against the model's own decoding and against whole gated runs; GRPO by hand."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from kvtool.errors import InputError
from kvtool.measuring import gates, rollouts
from kvtool.model import Model
from tests import models
from tests.models import random_ids
from tests.tolerance import close, error, same

REFUSED = ("gemma2", "gpt-oss")  # soft-capped logits, sink logits
SINK, RECENT = 2, 5


@pytest.fixture(params=[name for name in models.EVERY if name not in REFUSED])
def trainable(request: pytest.FixtureRequest) -> Model:
    return models.shared(request.param)


def filled(model: Model, value: float) -> torch.Tensor:
    return torch.full((model.geometry.layers, model.geometry.kv_heads), value)


def drawn(model: Model, seed: int = 0) -> torch.Tensor:
    """Gates between 0 and 1, open where a layer has a window of its own: such layers are not gated."""
    alpha = torch.rand(model.geometry.layers, model.geometry.kv_heads, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.tensor([window is None for window in model.geometry.windows])[:, None], alpha, 1.0)


def rolled(model: Model, prompt: torch.Tensor, alpha: torch.Tensor, **settings: object) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        cache = rollouts.prefill(model, prompt, alpha, sink=SINK, recent=RECENT)
    return rollouts.sample(model, cache, int(prompt[-1]), **{"samples": 3, "steps": 12, **settings})  # type: ignore[arg-type]


def naive(model: Model, prompt: torch.Tensor, samples: int, steps: int, temperature: float, seed: int) -> torch.Tensor:
    """The unchanged model's answers, a whole forward pass a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = prompt.expand(samples, -1)
    for _ in range(steps):
        with torch.no_grad():
            logits = model.network(input_ids=ids).logits[:, -1].float()
        if temperature:
            token = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        else:
            token = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
    return ids[:, len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_open_gates_write_what_the_model_writes(temperature: float, trainable: Model) -> None:
    """Card A5: α = 1."""
    prompt = random_ids(1, 30, seed=50)[0]
    expected = naive(trainable, prompt, 3, 12, temperature, seed=3)
    tokens, _ = rolled(
        trainable, prompt, filled(trainable, 1.0), temperature=temperature, generator=torch.Generator().manual_seed(3)
    )
    same(tokens, expected)
    assert bool((tokens[0] != tokens[1]).any()) == bool(temperature)


def test_closed_gates_write_something_else(llama: Model) -> None:
    prompt = random_ids(1, 30, seed=50)[0]
    shut = rolled(llama, prompt, filled(llama, 0.0), temperature=0.0)[0]
    assert bool((shut != rolled(llama, prompt, filled(llama, 1.0), temperature=0.0)[0]).any())


def test_probabilities_and_gradients_are_those_of_a_whole_gated_run(trainable: Model) -> None:
    """Two ways to the same: prompt and answers in one gated sequence each, and a shared prefill with its answers."""
    prompt, answers = random_ids(1, 20, seed=51)[0], random_ids(3, 9, seed=52)
    one, two = drawn(trainable).requires_grad_(True), drawn(trainable).requires_grad_(True)
    cache = rollouts.prefill(trainable, prompt, one, sink=SINK, recent=RECENT)
    logs = rollouts.log_probabilities(trainable, cache, int(prompt[-1]), answers, temperature=0.8)
    whole = []
    for answer in answers:
        ids = torch.cat([prompt, answer])
        recording = gates.record(trainable, ids)
        hidden = gates.gated(trainable, recording, two, sink=SINK, recent=RECENT, own_full=True)
        logits = trainable.network.get_output_embeddings()(hidden[len(prompt) - 1 : -1])
        scale = getattr(trainable.network, "logit_scale", None) or 1.0
        whole.append(torch.log_softmax(scale * logits / 0.8, -1).gather(1, answer[:, None])[:, 0])
    close(logs.detach(), torch.stack(whole).detach())
    if logs.requires_grad:
        weight = torch.randn(logs.shape, generator=torch.Generator().manual_seed(1))
        (logs * weight).sum().backward()
        (torch.stack(whole) * weight).sum().backward()
        assert one.grad is not None
        assert two.grad is not None
        close(one.grad, two.grad)
        assert float(one.grad.abs().max()) > 1e-2


def test_a_window_that_holds_all_is_no_gate(trainable: Model) -> None:
    prompt = random_ids(1, 20, seed=51)[0]
    kept = {}
    for value in (0.0, 1.0):
        cache = rollouts.prefill(trainable, prompt, filled(trainable, value), sink=0, recent=100)
        kept[value] = rollouts.log_probabilities(trainable, cache, int(prompt[-1]), random_ids(2, 6, seed=1))
    close(kept[0.0], kept[1.0])


def test_what_was_drawn_has_the_probability_that_is_told(llama: Model) -> None:
    prompt, alpha = random_ids(1, 20, seed=53)[0], drawn(llama)
    cache = rollouts.prefill(llama, prompt, alpha, sink=SINK, recent=RECENT)
    settings = dict(samples=4, steps=7, temperature=0.7)
    tokens, logs = rollouts.sample(
        llama, cache, int(prompt[-1]), generator=torch.Generator().manual_seed(0), **settings
    )  # type: ignore[arg-type]
    close(rollouts.log_probabilities(llama, cache, int(prompt[-1]), tokens, temperature=0.7), logs)
    again, _ = rollouts.sample(llama, cache, int(prompt[-1]), generator=torch.Generator().manual_seed(0), **settings)  # type: ignore[arg-type]
    same(again, tokens)  # what was written before is forgotten


def test_each_sample_sees_only_its_own_answer(llama: Model) -> None:
    prompt, alpha, answers = random_ids(1, 20, seed=54)[0], drawn(llama), random_ids(3, 8, seed=55)
    cache = rollouts.prefill(llama, prompt, alpha, sink=SINK, recent=RECENT)
    together = rollouts.log_probabilities(llama, cache, int(prompt[-1]), answers)
    for row, answer in enumerate(answers):
        close(rollouts.log_probabilities(llama, cache, int(prompt[-1]), answer[None]), together[row : row + 1])
    assert error(together[0], together[1]) > 1e-2


@pytest.mark.parametrize("name", REFUSED)
def test_soft_caps_and_sink_logits_are_refused(name: str) -> None:
    model = models.shared(name)
    with pytest.raises(InputError, match="gates cannot be trained"):
        rollouts.prefill(model, random_ids(1, 20)[0], filled(model, 1.0), sink=SINK, recent=RECENT)


def test_advantages_are_normalised_within_the_group() -> None:
    close(rollouts.advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])), torch.tensor([1.0, -1.0, -1.0, 1.0]) / 1.0002)
    close(rollouts.advantages(torch.tensor([1.0, 0, 0, 0]))[:1], torch.tensor([3**0.5 / (1 + 1e-4 / 0.1875**0.5)]))
    for value in (0.0, 1.0):
        same(rollouts.advantages(torch.full((5,), value)), torch.zeros(5))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.0, 1.0, 1.0), (2.0, 1.0, 1.4), (2.0, -1.0, -2.0), (0.5, 1.0, 0.5), (0.5, -1.0, -0.6), (1.3, 1.0, 1.3)],
)
def test_the_clipped_surrogate(ratio: float, advantage: float, expected: float) -> None:
    """Gains beyond the clip do not count, losses do."""
    before = torch.full((1, 3), -2.0)
    logs = (before + math.log(ratio)).requires_grad_(True)
    gain = rollouts.surrogate(logs, before, torch.tensor([advantage]), clip=0.4)
    close(gain.detach(), torch.tensor(expected))
    (slope,) = torch.autograd.grad(gain, logs)
    clipped = expected != ratio * advantage
    close(slope.sum(), torch.tensor(0.0 if clipped else ratio * advantage))


def test_a_dropped_cache_is_freed_at_once(llama: Model) -> None:
    """Without waiting for the collector of cycles, which does not see how much a graph holds."""
    gc.disable()
    try:
        alpha = drawn(llama).requires_grad_(True)
        cache = rollouts.prefill(llama, random_ids(1, 20)[0], alpha, sink=SINK, recent=RECENT)
        rollouts.log_probabilities(llama, cache, 1, random_ids(2, 6)).sum().backward()
        layers = [weakref.ref(layer) for layer in cache.layers]
        del cache
        assert [layer() for layer in layers] == [None] * len(layers)
    finally:
        gc.enable()
