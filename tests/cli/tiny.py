"""A tiny random Llama with a byte-level tokenizer, saved as a folder, and the smallest options for each command."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROBES = (
    "--set", "needle.lengths=300", "--set", "needle.depths=0.5", "--set", "needle.samples=1",
    "--set", "repeat.period=20", "--set", "repeat.samples=2",
)  # fmt: skip
PROFILE = ("--tokens", "64", "--samples", "2", *PROBES)
RAZOR = ("--for", "razor", "--set", "repeat.period=20", "--set", "repeat.samples=1")
DUO = ("--steps", "3", "--lengths", "200", "--set", "passkeys=1", "--set", "recent=16", "--set", "sink=4")
TEXT = ("--tasks", "text", "--set", "text.prompt=64", "--set", "text.tokens=4", "--set", "text.samples=2")
REPLAY = (
    "--lengths", "400", "--depths", "0.5", "--keys", "1", "--set", "text.prompt=64", "--set", "text.tokens=4",
    "--set", "text.samples=2", "--set", "generation.prompt=64", "--set", "generation.tokens=4",
    "--set", "speed.length=128", "--set", "speed.steps=2",
)  # fmt: skip


def save(folder: Path, *, seed: int = 0, broken: bool = False) -> Path:
    """2 layers, 4 query heads, 2 KV heads, head dim 8; `broken` has a NaN weight."""
    made, config = tokenizer(), LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    network = LlamaForCausalLM(config)
    if broken:
        network.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    network.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end token with id 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {character: index for index, character in enumerate(alphabet, 1)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
