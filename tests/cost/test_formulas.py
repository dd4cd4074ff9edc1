"""The cost model: the published example's numbers, and sums that are counted one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvtool.cost.formulas import Ledger, Network, Service
from kvtool.cost.hardware import Hardware
from tests.tolerance import close

LAYERS, HEADS, KV_HEADS, WIDTH = 60, 56, 8, 128  # Yi-34B: 34·10^9 weights in 16 bits
YI = Network(
    weights=68e9, streamed=68e9, multiplied=34e9, windows=(None,) * LAYERS, query_heads=HEADS, head_dim=WIDTH,
    group=HEADS // KV_HEADS,
)  # fmt: skip
A100 = Hardware("a100", {"bfloat16": 312e12}, memory=80e9, bandwidth=2e12, link=20e9)  # the paper's round numbers
SERVICE = Service(YI, A100, "bfloat16", share=1.0)


def dense(tokens: int, kv_heads: int = KV_HEADS) -> Ledger:
    """Keys and values in 16 bits."""
    held = 2 * LAYERS * tokens * kv_heads * WIDTH * 2
    return Ledger(held, 0, held, 0, LAYERS * kv_heads * tokens)


def near(actual: float, expected: float, digits: int) -> None:
    assert round(actual, digits) == expected


def test_the_published_example() -> None:
    """arXiv 2405.08944: 34B, 50,000 tokens, one A100."""
    near(dense(50_000).held / 1e9, 12.29, 2)
    near(dense(4_000).held / 1e9, 0.98, 2)
    assert [SERVICE.users(dense(tokens).held) for tokens in (4_000, 50_000)] == [12, 0]
    near(2 * 34e9 * 50_000 / 312e12, 10.9, 1)
    near((2 * 34e9 * 50_000 + YI.attention(50_000) / 2) / 312e12, 14.3, 1)  # half of the causal count is the paper's
    near((2 * 34e9 * 4_000 + YI.attention(4_000) / 2) / 312e12, 0.89, 2)
    nothing = Ledger(0, 0, 0, 0, 0)
    near(250 * SERVICE.step(nothing, 1), 8.5, 1)
    near(250 * SERVICE.step(dense(50_000), 1), 10.0, 1)
    near(SERVICE.cost(50_000, dense(50_000)).switch, 1.2, 1)
    near(SERVICE.cost(4_000, dense(4_000)).switch, 0.1, 1)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
def test_causal_attention_is_counted_one_by_one(window: int | None) -> None:
    tokens, network = 12, replace(YI, windows=(window,))
    products = 0
    for query in range(tokens):
        for key in range(query + 1):
            products += window is None or query - key < window
    assert network.attention(tokens) == 2 * 2 * HEADS * WIDTH * products  # q·k and weight·v, a multiplication and a sum


def test_prefill_has_both_terms() -> None:
    work = 2 * 34e9 * 5_000 + 2 * LAYERS * HEADS * WIDTH * 5_000 * 5_001
    assert SERVICE.prefill(5_000) == work / 312e12


def test_the_bound_of_a_decode_step() -> None:
    """Held by the paper's (W + B·KV) / (W + B·KV'), and by what no cache at all would reach."""
    service, full = replace(SERVICE, batch=4), dense(50_000)
    less = Ledger(0, 0, full.read / 8, 0, 0)
    faster = service.step(full, 4) / service.step(less, 4)
    expected = (68e9 + 4 * full.read) / (68e9 + 4 * less.read)
    close(torch.tensor(faster), torch.tensor(expected))
    assert 1 < faster < service.most(full) == (68e9 + 4 * full.read) / 68e9


def test_fewer_kv_heads_divide_the_cache() -> None:
    assert dense(1_000, HEADS).held == HEADS // KV_HEADS * dense(1_000).held


def test_many_users_wait_for_operations() -> None:
    small = Ledger(1, 0, 1, 0, 0)
    batch = 100_000
    assert SERVICE.step(small, batch) == batch * 2 * 34e9 / 312e12


def test_what_comes_from_the_host_is_waited_for() -> None:
    moved = Ledger(0, 5e9, 0, 2e9, 0)
    assert SERVICE.step(moved, 3) == 68e9 / 2e12 + 3 * 2e9 / 20e9
    assert SERVICE.cost(1_000, moved).switch == 2 * 5e9 / 20e9


def test_a_session_of_all_users() -> None:
    cache = dense(4_000)
    made = replace(SERVICE, generated=100).cost(4_000, cache)
    parts = 12 * (made.prefill + made.switch) + 100 * SERVICE.step(cache, 12)
    assert (made.users, made.session) == (12, parts)
    assert made.tokens_per_second == 12 * 100 / parts


def test_a_cache_that_does_not_fit() -> None:
    made = SERVICE.cost(50_000, dense(50_000))
    assert (made.users, made.tokens_per_second, made.session) == (0, 0.0, math.inf)
    assert replace(SERVICE, share=0.5).users(1.0) == 0  # not even the weights
