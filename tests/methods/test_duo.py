"""Known answers of DuoAttention, card A2; check d (all heads full gives the model's logits) is law 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.measuring import gates
from kvtool.methods.duo import trapezoid
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.methods.training import interrupted
from tests.models import INDUCTION, random_ids, repeated, with_tokenizer
from tests.tolerance import close, error

SMALL = dict(steps=24, lengths=(220,), passkeys=1, sink=4, recent=16, lr=0.15, full=1 / 8)

REFUSED = ("gemma2", "gpt-oss")  # soft-capped logits, sink logits


def duo(model: Model, **settings: object) -> Plan:
    return calibrate("duo", {**SMALL, **settings}, model=with_tokenizer(model))


def alphas(model: Model, value: float) -> torch.Tensor:
    return torch.full((model.geometry.layers, model.geometry.kv_heads), value)


@pytest.fixture(params=[name for name in models.EVERY if name not in REFUSED])
def trainable(request: pytest.FixtureRequest) -> Model:
    return models.shared(request.param)


def test_the_recording_is_the_model(trainable: Model) -> None:
    ids = random_ids(1, 40, seed=40)
    with torch.no_grad():
        expected = trainable.network.base_model(input_ids=ids).last_hidden_state[0]
    close(gates.record(trainable, ids[0]).hidden, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_soft_caps_and_sink_logits_are_refused(name: str) -> None:
    model = models.shared(name)
    with pytest.raises(InputError, match="gates cannot be trained"):
        gates.gated(model, gates.record(model, random_ids(1, 40)[0]), alphas(model, 1.0), sink=2, recent=5)


@pytest.mark.parametrize("own_full", [False, True])
def test_open_gates_change_nothing(own_full: bool, trainable: Model) -> None:
    """Check a: α = 1 gives the model's own states; nothing but the regulariser pulls at the gates."""
    recording = gates.record(trainable, random_ids(1, 40, seed=40)[0])
    alpha = alphas(trainable, 1.0).requires_grad_(True)
    hidden = gates.gated(trainable, recording, alpha, sink=2, recent=5, own_full=own_full)
    close(hidden.detach(), recording.hidden)
    if hidden.requires_grad:
        (gradient,) = torch.autograd.grad((hidden - recording.hidden).square().mean(), alpha)
        assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("own_full", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_window_that_holds_all_changes_nothing(value: float, own_full: bool, trainable: Model) -> None:
    """Check b: n ≤ S + R."""
    recording = gates.record(trainable, random_ids(1, 40, seed=41)[0])
    alpha = alphas(trainable, value)
    for sink, recent in ((8, 32), (0, 40), (0, 500), (39, 1)):
        with torch.no_grad():
            hidden = gates.gated(trainable, recording, alpha, sink=sink, recent=recent, own_full=own_full)
        close(hidden, recording.hidden)


def test_closed_gates_lose_something(model: Model) -> None:
    recording = gates.record(model, random_ids(1, 40, seed=41)[0])
    with torch.no_grad():
        assert error(gates.gated(model, recording, alphas(model, 0.0), sink=1, recent=4), recording.hidden) > 0.05


def test_the_gradient_is_right(llama: Model) -> None:
    """Against finite differences, gate by gate."""
    recording = gates.record(llama, random_ids(1, 40, seed=42)[0])
    alpha = torch.rand(llama.geometry.layers, llama.geometry.kv_heads)

    def loss(alpha: torch.Tensor) -> torch.Tensor:
        hidden = gates.gated(llama, recording, alpha, sink=1, recent=4)
        return (hidden - recording.hidden).double().square().mean()

    (gradient,) = torch.autograd.grad(loss(live := alpha.clone().requires_grad_(True)), live)
    with torch.no_grad():
        for place in ((0, 0), (1, 1), (2, 0)):
            step = torch.zeros_like(alpha)
            step[place] = 1e-2
            slope = (loss(alpha + step) - loss(alpha - step)) / 2e-2
            assert float(gradient[place]) == pytest.approx(float(slope), rel=2e-2, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 63, 128, 129, 300])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (3, 7), (5, 200), (400, 2), (0, 300)])
def test_windowed_attention(sink: int, recent: int, tokens: int) -> None:
    """Causal attention over the first S and the last R positions, against explicit masks."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = (column <= row) & ((column < sink) | (column > row - recent))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True, scale=0.3)
    close(gates.windowed(q, k, v, sink=sink, recent=recent, scale=0.3), expected)


def test_the_induction_head_keeps_its_gate(induction: Model) -> None:
    """Check c: its gate stays above 0.9 and all others fall to about 0."""
    plan = duo(induction)
    alpha = plan.evidence["alpha"].clone()
    assert float(alpha[INDUCTION]) > 0.9
    alpha[INDUCTION] = 0.0
    assert float(alpha.max()) < 0.05
    assert plan.keep is not None
    assert plan.keep.full.nonzero().tolist() == [list(INDUCTION)]


def test_gates_trained_on_repeats_of_token_ids(induction: Model) -> None:
    """The same without text: the second copy of a repeat is the answer."""
    alpha = alphas(induction, 1.0).requires_grad_(True)
    optimiser = torch.optim.AdamW([alpha], lr=0.15, weight_decay=0.0)
    for step in range(20):
        recording = gates.record(induction, repeated(48, 2, seed=step))
        hidden = gates.gated(induction, recording, alpha, sink=2, recent=8)
        loss = (hidden - recording.hidden)[48:].square().mean() + 0.05 * alpha.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            alpha.clamp_(0.0, 1.0)
    assert float(alpha.detach()[INDUCTION]) > 0.9
    assert float(alpha.detach().sum()) < 1.1


def test_the_learning_rate_is_a_trapezoid() -> None:
    factors = [trapezoid(step, 50) for step in range(50)]
    assert factors[0] == factors[-1] == 0.1
    assert factors[10:40] == [1.0] * 30
    assert factors == factors[::-1]


def test_an_interrupted_training_resumes_where_it_was(tmp_path: Path, llama: Model) -> None:
    settings = {**SMALL, "steps": 8, "patience": 0}
    seen = interrupted("duo", settings, with_tokenizer(llama), tmp_path, 5)
    assert 4 < seen[0] + 1 <= 6


def test_every_head_with_a_window_of_its_own_stays_as_it_is() -> None:
    for name in ("gemma3", "mistral-window"):
        model = models.shared(name)
        plan = duo(model, steps=2, full=0.5)
        assert plan.keep is not None
        for layer, window in enumerate(model.geometry.windows):
            if window is not None:
                assert bool(plan.keep.full[layer].all())
                assert plan.evidence["alpha"][layer].tolist() == [1.0] * model.geometry.kv_heads


def test_gates_of_another_run(tmp_path: Path, induction: Model) -> None:
    table = tmp_path / "full_attention_heads.tsv"
    table.write_text("\n".join("\t".join(map(str, row)) for row in [[0, 0.2, 0.1, 0], [0.9, 0, 0, 1.2]]))
    plan = duo(induction, gates=str(table), full=1 / 4)
    assert plan.keep is not None
    assert plan.keep.full.nonzero().tolist() == [[1, 0], [1, 3]]
    again = duo(induction, gates=plan.write(str(tmp_path / "plan")), full=1 / 8)
    assert again.keep is not None
    assert again.keep.full.nonzero().tolist() == [[1, 3]]
    for text, complaint in (("1\t2", "another model"), ("a\tb", "cannot read")):
        table.write_text(text)
        with pytest.raises(InputError, match=complaint):
            duo(induction, gates=str(table))


def test_it_needs_the_model() -> None:
    with pytest.raises(InputError, match="runs the model"):
        calibrate("duo", {})
