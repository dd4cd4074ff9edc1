"""The demo model with its real tokenizer, and a tiny random one that has none."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtool import model as models


@pytest.fixture(scope="session")
def demo() -> models.Model:
    return models.load(models.DEMO)


@pytest.fixture(scope="session")
def bare() -> models.Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return models.Model(LlamaForCausalLM(config).eval(), None, "bare")
