"""A tiny model with a tokenizer of bytes, and plans for it that lose nothing or much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtool.model import Model, load
from kvtool.plan import Plan
from kvtool.slots import Keep
from tests.cli.tiny import save

LONG = 5000  # more entries than any test has

Windowed = Callable[..., Plan]


def windowed(model: Model, *, full: bool = False, sink: int = 2, recent: int = 12, **options: Any) -> Plan:
    """Every KV head keeps everything, or every one sinks and a window."""
    shape = (model.geometry.layers, model.geometry.kv_heads)
    keep = Keep.heads(torch.full(shape, full), sink=sink, recent=recent, **options)
    return Plan("by hand", model.fingerprint, keep=keep)


# Each keeps all of a short sequence, by another lane or another way to be fed.
LOSSLESS: dict[str, dict[str, Any]] = {
    "full": {"full": True},
    "wide": {"recent": LONG},
    "wide-compensated": {"recent": LONG, "compensate": True},
    "wide-reindexed": {"recent": LONG, "position": "reindex"},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(str(save(tmp_path_factory.mktemp("replay") / "tiny llama")))
