"""What is found out about a model by running it, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kvtool.cache.segment_cache import SegmentCache
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.trace import geometry
from tests import models
from tests.laws.methods import ragged
from tests.laws.reference import dense
from tests.models import SIZES, WINDOW, random_ids, with_tokenizer
from tests.running import feed, own
from tests.tolerance import close

GROUPS = {"mha": (6, 6), "mqa": (6, 1), "gpt-neox": (6, 6), "cohere": (6, 2)}
WINDOWS = {
    "mistral-window": (WINDOW,) * 3,
    **dict.fromkeys(("gemma2", "gemma3", "gpt-oss"), (WINDOW, None, WINDOW, None)),
}


def test_geometry(any_model: Model) -> None:
    g = any_model.geometry
    assert (g.query_heads, g.kv_heads) == GROUPS.get(any_model.name, (6, 2))
    assert (g.head_dim, g.hidden, g.vocabulary) == (8, 48, models.VOCABULARY)
    assert g.windows == WINDOWS.get(any_model.name, (None,) * 3)
    assert geometry(any_model.fingerprint) == g


def test_the_rotation_that_was_found(any_model: Model) -> None:
    for layer in range(any_model.geometry.layers):
        rotary = any_model.rotary(layer)
        assert rotary.width == (4 if any_model.name == "gpt-neox" else 8)
        assert rotary.interleaved == (any_model.name == "cohere")


def test_fingerprints_differ(any_model: Model) -> None:
    assert any_model.fingerprint == models.build(any_model.name).fingerprint
    assert any_model.fingerprint["weights"] != models.build(any_model.name, seed=1).fingerprint["weights"]


def test_rope_is_part_of_the_fingerprint() -> None:
    ropes = [models.shared(name).fingerprint["rope"] for name in ("llama", "rope-linear", "rope-llama3", "rope-yarn")]
    assert len(set(ropes)) == 4


def test_positions_that_enter_elsewhere() -> None:
    """GPT-2 adds learned positions to its input: no rotation, and reindexing is impossible but nothing else is."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_embd=48, n_layer=2, n_head=6, initializer_range=0.2, bos_token_id=None, eos_token_id=None
    )
    model = Model(GPT2LMHeadModel(config).eval().requires_grad_(False), None, "gpt2")
    assert (model.geometry.query_heads, model.geometry.kv_heads, model.rotary(0).module) == (6, 6, None)
    ids, plan = random_ids(1, 30), ragged(model)
    close(feed(model, SegmentCache(model), ids, [20, *[1] * 10]), own(model, ids))
    decode = feed(model, SegmentCache(model, plan, protocol="strict"), ids, [1] * 30)
    close(feed(model, SegmentCache(model, plan, protocol="strict"), ids, [20, *[1] * 10]), decode)


def test_biases_on_the_projections() -> None:
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(Qwen2Config(**{key: value for key, value in SIZES.items() if key != "head_dim"})).eval()
    for parameter in network.requires_grad_(False).parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    model = Model(network, None, "qwen2")
    ids, plan = random_ids(1, 24), ragged(model, position="reindex", compensate=False)
    close(
        feed(model, SegmentCache(model, plan, protocol="strict"), ids, [24])[0],
        dense(model, ids[0], plan, [24], strict=True),
    )


def test_state_space_models_are_refused() -> None:
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = Model(MambaForCausalLM(config).eval(), None, "mamba")
    with pytest.raises(InputError, match="mamba cannot be served"):
        _ = model.geometry


def test_tokens_that_start_a_text() -> None:
    llama = models.shared("llama")
    assert llama.start == []
    assert with_tokenizer(llama).start == []
    assert with_tokenizer(llama, start=True).start == [0]
    assert with_tokenizer(llama, start=True).ids("ab").tolist() == [97, 98]
    with pytest.raises(InputError, match="no tokenizer"):
        llama.ids("ab")


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("./nowhere", {}, "no such model folder"),
        ("none.gguf", {}, "no such GGUF file"),
        ("smollm2", {"dtype": "int3"}, "unknown dtype"),
        ("smollm2", {"device": "abacus"}, "unknown device"),
    ],
)
def test_what_cannot_be_loaded(name: str, options: dict[str, str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load(name, **options)
