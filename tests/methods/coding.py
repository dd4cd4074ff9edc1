"""What tests of methods that encode entries share: bits held, and random entries."""

from __future__ import annotations

import torch

from kvtool.encoding.encoding import Encoding
from kvtool.plan import Plan


def entries(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(encoding: Encoding, x: torch.Tensor) -> torch.Tensor:
    return encoding.decode(encoding.encode(x), x.shape[-1])


def bits(encoding: Encoding, heads: int, width: int) -> float:
    """Bits a number of one side, from the bytes of what is written."""
    x = entries(1, heads, encoding.block, width)
    return 8 * sum(tensor.nbytes for tensor in encoding.encode(x).values()) / x.numel()


def share(plan: Plan) -> float:
    """Bytes of what is coded in the first layer, in those of 16-bit keys and values."""
    store, heads, width = plan.store, plan.model["kv_heads"], plan.model["head_dim"]
    assert store is not None
    pair = store.keys[store.index[0, 0]], store.values[store.index[0, 0]]
    return sum(bits(encoding, heads, width) for encoding in pair) / 32
