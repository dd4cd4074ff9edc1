"""Tiny models built in memory: five architectures, the corner cases of attention, and one whose heads are set by hand.

Every builder is seeded and returns a `kvtool.model.Model` without a tokenizer; `with_tokenizer` adds one of single
characters. Weights are large enough for attention to be peaked: a cache that loses an entry moves the logits by far
more than the tolerance.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvtool.model import Model

VOCABULARY = 128  # every ASCII character is a token
WINDOW = 7  # of the layers that have a sliding window of their own
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MIXED: dict[str, Any] = SIZES | dict(
    num_hidden_layers=4, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
)


def _model(name: str, network_class: Any, config: Any, seed: int) -> Model:
    torch.manual_seed(seed)
    network = network_class(config)
    for parameter in network.parameters():
        if parameter.dim() == 1:  # norm weights, biases and sink logits would otherwise be all ones or zeros
            parameter.data += 0.2 * torch.randn_like(parameter)
    return Model(network.eval().requires_grad_(False), None, name)


def _llama(name: str, **changes: Any) -> Callable[[int], Model]:
    return lambda seed: _model(name, LlamaForCausalLM, LlamaConfig(**SIZES | changes), seed)


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "factor": 4.0, **parameters}}


ARCHITECTURES: dict[str, Callable[[int], Model]] = {
    "llama": _llama("llama"),
    "qwen3": lambda seed: _model("qwen3", Qwen3ForCausalLM, Qwen3Config(**SIZES), seed),
    "gemma3": lambda seed: _model(
        "gemma3", Gemma3ForCausalLM, Gemma3TextConfig(**MIXED, query_pre_attn_scalar=8), seed
    ),
    "gpt-neox": lambda seed: _model(
        "gpt-neox",
        GPTNeoXForCausalLM,
        GPTNeoXConfig(
            **{key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")},
            rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ),
        seed,
    ),
    "mistral": lambda seed: _model("mistral", MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None), seed),
}

# Corner cases: head layouts, rotation rules, soft caps, sink logits, a window in every layer, interleaved pairs.
VARIANTS: dict[str, Callable[[int], Model]] = {
    "mha": _llama("mha", num_key_value_heads=6),
    "mqa": _llama("mqa", num_key_value_heads=1),
    "rope-linear": _llama("rope-linear", **_rope(rope_type="linear")),
    "rope-llama3": _llama(
        "rope-llama3",
        **_rope(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "rope-yarn": _llama(
        "rope-yarn",
        max_position_embeddings=256,
        **_rope(rope_type="yarn", attention_factor=1.3, original_max_position_embeddings=64),
    ),
    "mistral-window": lambda seed: _model(
        "mistral-window", MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW), seed
    ),
    "cohere": lambda seed: _model(
        "cohere", CohereForCausalLM, CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}), seed
    ),
    "gemma2": lambda seed: _model(
        "gemma2",
        Gemma2ForCausalLM,
        Gemma2Config(**MIXED, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=30.0),
        seed,
    ),
    "gpt-oss": lambda seed: _model(
        "gpt-oss", GptOssForCausalLM, GptOssConfig(**MIXED, num_local_experts=2, num_experts_per_tok=1), seed
    ),
}
# Angles of all positions are others in texts of more than 32 tokens: where laws hold in shorter ones alone.
LONG = 32
STRETCHED: dict[str, Callable[[int], Model]] = {
    "rope-dynamic": _llama("rope-dynamic", max_position_embeddings=LONG, **_rope(rope_type="dynamic")),
    "rope-longrope": _llama(
        "rope-longrope",
        max_position_embeddings=4 * LONG,
        **_rope(
            rope_type="longrope",
            original_max_position_embeddings=LONG,
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.0, 2.0, 3.0, 4.0],
        ),
    ),
}
EVERY = ARCHITECTURES | VARIANTS


def build(name: str, seed: int = 0) -> Model:
    """A fresh tiny model by its name in `EVERY` or `STRETCHED`."""
    return (EVERY | STRETCHED)[name](seed)


@functools.cache
def shared(name: str) -> Model:
    """The same object for every test that asks; whoever changes it builds a fresh one instead."""
    return build(name)


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """int64 [batch, tokens]."""
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


class Characters:
    """The least of a tokenizer: one token per ASCII character; id 0 is the start token where there is one."""

    all_special_ids = (0,)
    eos_token_id = None
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 (the tokenizers' own interface)

    def __init__(self, *, start: bool = False):
        self.start, self.bos_token_id = start, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = [ord(character) for character in text.encode("ascii", "replace").decode()]
        return SimpleNamespace(input_ids=[0] * (self.start and add_special_tokens) + ids)

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def with_tokenizer(model: Model, *, start: bool = False) -> Model:
    """The same network with a tokenizer of characters."""
    return dataclasses.replace(model, tokenizer=Characters(start=start))


# The induction model: layer, head of its three working heads. All other heads attend uniformly and put out nothing.
PREVIOUS, ECHO, INDUCTION = (0, 0), (0, 2), (1, 1)
CODE = 96  # width of a token's code: the head dim less the turning pairs
TURNING = 16  # rotary pairs with a frequency that matters; the others hardly turn within any context


def induction_model() -> Model:
    """A two-layer Llama that continues a repeated sequence, all by one induction head.

    The residual stream is [1 | token | previous token | prediction]. Layer 0 has the previous-token head (queries and
    keys are constants turned by RoPE, one position apart) and an echo head that finds equal tokens but puts out
    nothing. Layer 1 has the induction head: the current token's code looks for entries whose previous token it was.
    Every query head has a KV head of its own.
    """
    heads, width, hidden = 4, CODE + 2 * TURNING, 4 + 3 * CODE  # a multiple of the heads: three channels are idle
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=8, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=width, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )  # fmt: skip
    network = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.zero_()
    generator = torch.Generator().manual_seed(7)
    codes = torch.randn(VOCABULARY, CODE, generator=generator).sign() / CODE**0.5
    one, token, previous, prediction = (
        slice(0, 1), slice(1, 1 + CODE), slice(1 + CODE, 1 + 2 * CODE), slice(1 + 2 * CODE, 1 + 3 * CODE),
    )  # fmt: skip
    network.model.embed_tokens.weight[:, one] = 1.0
    network.model.embed_tokens.weight[:, token] = codes
    network.lm_head.weight[:, prediction] = codes
    for layer, squares in enumerate((2.0, 3.0)):  # the norm undoes itself: every token's stream has this squared length
        network.model.layers[layer].input_layernorm.weight.fill_((squares / hidden) ** 0.5)
    network.model.norm.weight.fill_(2.0)  # sharpens the prediction

    pair = torch.arange(TURNING, width // 2)
    still = torch.cat([pair, pair + width // 2])  # channels that RoPE hardly turns, CODE of them
    frequency = 1e30 ** (-2.0 * torch.arange(TURNING, dtype=torch.float64) / width)
    identity = torch.eye(CODE)

    def projection(layer: int, name: str, head: int) -> torch.Tensor:  # [D,hidden]
        return getattr(network.model.layers[layer].self_attn, name).weight[head * width : (head + 1) * width]

    def output(layer: int, head: int) -> torch.Tensor:  # [hidden,D]
        return network.model.layers[layer].self_attn.o_proj.weight[:, head * width : (head + 1) * width]

    strength = 60.0 * width**0.5  # of a perfect match, as a logit times √D
    layer, head = PREVIOUS
    turned = (frequency.cos().float(), frequency.sin().float())  # the query stands as if one position earlier
    projection(layer, "q_proj", head)[:TURNING, 0] = strength * turned[0]
    projection(layer, "q_proj", head)[width // 2 : width // 2 + TURNING, 0] = -strength * turned[1]
    projection(layer, "k_proj", head)[:TURNING, 0] = 1.0
    projection(layer, "v_proj", head)[still, token] = identity
    output(layer, head)[previous, still] = identity

    layer, head = ECHO
    projection(layer, "q_proj", head)[still, token] = strength * identity
    projection(layer, "k_proj", head)[still, token] = identity

    layer, head = INDUCTION
    projection(layer, "q_proj", head)[still, token] = strength * identity
    projection(layer, "k_proj", head)[still, previous] = identity
    projection(layer, "k_proj", head)[still, token] = -0.5 * identity  # the first token is its own predecessor
    projection(layer, "v_proj", head)[still, token] = identity
    output(layer, head)[prediction, still] = identity
    return Model(network, None, "induction")


@functools.cache
def double(name: str) -> Model:
    """A shared tiny model in fp64. Codes jump where a number crosses a rounding border; two ways to compute the same
    numbers must agree far beyond fp32 for their codes to agree on every machine."""
    model = build(name)
    model.network.to(torch.float64)
    return model


def repeated(period: int, copies: int, seed: int = 0) -> torch.Tensor:
    """int64 [period·copies]: a random sequence of distinct tokens (never 0), again and again."""
    order = torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(seed)) + 1
    return order[:period].repeat(copies)


def shallow(name: str) -> Model:
    """The first layer of a tiny model with its embedding and output: what it stores depends on the tokens alone."""
    model = build(name)
    network = model.network
    network.config.num_hidden_layers = 1
    network.base_model.layers = network.base_model.layers[:1]
    return Model(network, None, f"shallow {name}")
