"""Twins of `attend` against its definition, over hostile shapes, poisoned memory and every way to hide an entry."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvtool_kernels import ops
from kvtool_kernels.attend.spec import CASES, Case, inputs
from tests.kernels.twins import device, names, reference, twin
from tests.tolerance import close

define = reference("attend")


def agree(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, lse = actual
    assert out.dtype == expected[0].dtype
    assert lse.dtype == torch.float32
    close(out, expected[0].to(out.device))
    empty = expected[1] == float("-inf")
    assert torch.equal(lse.cpu() == float("-inf"), empty.cpu())
    size = expected[1].masked_fill(empty, 0.0).abs().max().clamp_min(1.0) if expected[1].numel() else 1.0
    close(lse.masked_fill(empty, 0.0) / size, expected[1].masked_fill(empty, 0.0) / size, out.dtype)
    assert not bool(out.masked_select(empty[..., None]).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", names("attend"))
def test_twins(name: str, case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype=dtype, device=device(name))
    agree(twin("attend", name)(**given), define(**given))


@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_is_softmax_attention(causal: bool) -> None:
    given = inputs(Case(batch=2, heads=6, kv_heads=3, tokens=63, entries=63, causal=causal))
    out, lse = define(**given)
    q, k, v = (given[name] for name in "qkv")
    close(out, scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))
    logits = given["scale"] * torch.einsum("bktd,bksd->bkts", q[:, ::2], k)  # the first head of each group
    if causal:
        logits = logits.masked_fill(torch.ones(63, 63, dtype=torch.bool).triu(1), float("-inf"))
    close(lse[:, ::2], logits.exp().sum(-1).log())


def test_an_empty_segment_is_the_neutral_element() -> None:
    given = inputs(Case(entries=0, tokens=3))
    for function in (define, ops.attend):
        out, lse = function(**given)
        assert out.shape == given["q"].shape
        assert not bool(out.any())
        assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("name", names("attend"))
def test_memory_beyond_the_entries_is_not_read(name: str, tokens: int) -> None:
    """k and v are views into larger buffers whose tails hold NaN."""
    given = inputs(Case(batch=2, tokens=tokens, entries=63, causal=tokens > 1), device=device(name))
    expected = define(**given)
    for key in "kv":
        buffer = torch.full((2, 2, 100, 64), float("nan"), device=given[key].device)
        buffer[:, :, :63] = given[key]
        given[key] = buffer[:, :, :63]
    agree(twin("attend", name)(**given), expected)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("name", names("attend"))
def test_channels_need_not_be_neighbours_in_memory(name: str, which: str) -> None:
    given = inputs(Case(batch=2, heads=4, kv_heads=2, tokens=9, entries=63), device=device(name))
    expected = define(**given)
    given[which] = given[which].transpose(2, 3).contiguous().transpose(2, 3)
    agree(twin("attend", name)(**given), expected)


@pytest.mark.parametrize("cuts", [[63], [1, 62], [20, 0, 43], [7, 7, 7, 42]], ids=str)
def test_segments_merge_to_the_whole(cuts: list[int]) -> None:
    given = inputs(Case(batch=2, tokens=5, entries=63, softcap=3.0, size=5.0))
    expected = define(**given)
    partial, start = None, 0
    for count in cuts:
        piece = {**given, **{name: given[name][:, :, start : start + count] for name in "kv"}}
        partial = ops.attend(**piece) if partial is None else ops.merge(partial, ops.attend(**piece))
        start += count
    agree(partial, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 1), (2, 9, 3, 500), (1, 3, 1, 1000), (2, 8, 1, 300), (1, 6, 6, 700)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_token_and_its_logits(dtype: torch.dtype, shape: tuple[int, ...], softcap: float | None) -> None:
    batch, heads, kv_heads, entries = shape
    case = Case(batch=batch, heads=heads, kv_heads=kv_heads, entries=entries, softcap=softcap, size=3.0, width=40)
    given = inputs(case, dtype=dtype)
    expected = define(**given)
    del given["causal"], given["bias"]
    out, lse, logits = ops.attend_scored(**given)
    close(out, expected[0])
    close(lse, expected[1].to(lse), dtype)
    weights = torch.exp(logits - lse[..., None]) @ given["v"].to(lse).repeat_interleave(heads // kv_heads, 1)
    close(weights.to(dtype), expected[0])
