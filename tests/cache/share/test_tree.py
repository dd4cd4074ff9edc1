"""Several caches in one pass, and prompts whose common beginnings are held once: as if each prompt were alone."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.shared import Shared
from kvtool.cache.share.together import feed, held
from kvtool.cache.share.tree import Branch, Node, read, tree
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.packing import Row, bins
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import ragged
from tests.laws.stores import stored
from tests.models import random_ids
from tests.running import feed as fed_alone
from tests.tolerance import close, same

STEPS = 5


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def family() -> list[torch.Tensor]:
    """Three levels of sharing, ragged: a trunk of 20 tokens, limbs of 9 and 14, leaves of many lengths, and others."""
    trunk, limb, other = random_ids(1, 20, seed=1)[0], random_ids(1, 9, seed=2)[0], random_ids(1, 14, seed=3)[0]
    leaves = [random_ids(1, n, seed=10 + number)[0] for number, n in enumerate((4, 7, 4, 3, 6))]
    return [
        torch.cat([trunk, limb, leaves[0]]), torch.cat([trunk, other, leaves[1]]),
        torch.cat([trunk, limb, leaves[2]]), torch.cat([trunk, leaves[3]]), torch.cat([trunk, limb]),
        random_ids(1, 11, seed=30)[0], torch.cat([trunk, other, leaves[1]]), random_ids(1, 1, seed=31)[0],
    ]  # fmt: skip


def plan_of(name: str, model: Model) -> Plan | None:
    return None if name == "full" else ragged(model) if name == "ragged" else stored(model, name, sink=2)


def alone(model: Model, plan: Plan | None, prompt: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Logits [1+STEPS,V] after the prompt's last token and each of steps [STEPS], which are decoded one by one."""
    whole = torch.cat([prompt, steps])[None]
    cache = SegmentCache(model, plan, prompt_length=len(prompt) - 1)
    chunks = [1] * (1 + STEPS) if len(prompt) == 1 else [len(prompt) - 1, *[1] * (1 + STEPS)]
    return fed_alone(model, cache, whole, chunks)[0, len(prompt) - 1 :]


def decoded(model: Model, branches: list[Branch], prompts: list[torch.Tensor], steps: torch.Tensor) -> torch.Tensor:
    """Logits [N,1+STEPS,V] of all prompts; steps [N,STEPS]."""
    rows, found = [torch.cat([p[-1:], s]) for p, s in zip(prompts, steps, strict=True)], []
    for at in range(1 + STEPS):
        pieces = [torch.stack([rows[index][at : at + 1] for index in branch.prompts]) for branch in branches]
        made = torch.cat(feed(model, [branch.cache for branch in branches], pieces))
        order = torch.tensor([index for branch in branches for index in branch.prompts]).argsort()
        found.append(made[order])
    return torch.stack(found, 1)


def test_rows_are_filled_in_order() -> None:
    assert bins([3, 4, 5, 2, 9, 1, 1, 1], 8) == [[0, 1], [2, 3], [4], [5, 6, 7]]
    assert bins([3, 4, 5, 2, 9, 1, 1, 1], 8, most=2) == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert bins([], 8) == []


def test_a_row_is_cut_as_it_was_joined() -> None:
    row = Row([random_ids(1, 5), random_ids(3, 2), random_ids(1, 1)], [0, 7, 30])
    same(row.positions[0], ids(0, 1, 2, 3, 4, 7, 8, 7, 8, 7, 8, 30))
    same(row.last, ids(4, 6, 8, 10, 11))
    x = torch.randn(1, 6, 12, 8)
    parts = row.heads(x)
    assert [tuple(part.shape) for part in parts] == [(1, 6, 5, 8), (3, 6, 2, 8), (1, 6, 1, 8)]
    same(parts[1][2, :, 1], x[0, :, 10])
    same(row.joined(parts), x)


def test_the_tree_of_a_prompt_set() -> None:
    prompts = [ids(1, 2, 3, 4, 5), ids(1, 2, 3, 4, 6, 7), ids(1, 2, 9), ids(8), ids(1, 2, 3, 4), ids(8)]
    nodes = tree(prompts, least=2)
    expected = [
        Node(ids(1, 2), -1, ()), Node(ids(3, 4), 0, (4,)), Node(ids(5), 1, (0,)), Node(ids(6, 7), 1, (1,)),
        Node(ids(9), 0, (2,)), Node(ids(8), -1, (3, 5)),
    ]  # fmt: skip
    assert [(n.tokens.tolist(), n.parent, n.ends) for n in nodes] == [
        (n.tokens.tolist(), n.parent, n.ends) for n in expected
    ]
    longer = tree(prompts, least=3)  # what they all begin with is too short for a node of its own
    assert [(n.tokens.tolist(), n.parent, n.ends) for n in longer] == [
        ([1, 2, 3, 4], -1, (4,)), ([5], 0, (0,)), ([6, 7], 0, (1,)), ([1, 2, 9], -1, (2,)), ([8], -1, (3, 5)),
    ]  # fmt: skip


def test_a_tree_holds_every_prompt() -> None:
    prompts = family()
    nodes = tree(prompts, least=3)
    for index, prompt in enumerate(prompts):
        (at,) = [number for number, node in enumerate(nodes) if index in node.ends]
        parts = []
        while at >= 0:
            parts.append(nodes[at].tokens)
            assert nodes[at].parent < at
            at = nodes[at].parent
        same(torch.cat(parts[::-1]), prompt)


@pytest.mark.parametrize("name", ["full", "ragged", "four-bits", "joined-with-keys"])
def test_packed_is_separate(name: str) -> None:
    """The known answer of prepacking: the same outputs, and the same keys in every cache, so that positions restart."""
    model = models.double("llama")
    plan, prompts = plan_of(name, model), [random_ids(rows, n, seed=n) for rows, n in ((1, 9), (2, 4), (1, 31))]
    caches = [SegmentCache(model, plan, prompt_length=prompt.shape[1]) for prompt in prompts]
    made = feed(model, caches, prompts)
    for prompt, cache, logits in zip(prompts, caches, made, strict=True):
        other = SegmentCache(model, plan, prompt_length=prompt.shape[1])
        close(logits, fed_alone(model, other, prompt, [prompt.shape[1]])[:, -1])
        for mine, theirs in zip(cache._all(), other._all(), strict=True):
            for ours, expected in zip(mine.recall()[:2], theirs.recall()[:2], strict=True):
                close(ours, expected)
    assert [cache.get_seq_length() for cache in caches] == [9, 4, 31]


@pytest.mark.parametrize("name", ["full", "ragged"])
def test_packed_in_every_architecture(name: str, any_model: Model) -> None:
    plan, prompts = plan_of(name, any_model), [random_ids(1, n, seed=n) for n in (9, 4, 31)]
    caches = [SegmentCache(any_model, plan) for _ in prompts]
    made = feed(any_model, caches, prompts)
    again = feed(any_model, caches, [prompt[:, :1] for prompt in prompts])
    for prompt, *logits in zip(prompts, made, again, strict=True):
        whole = torch.cat([prompt, prompt[:, :1]], 1)
        expected = fed_alone(any_model, SegmentCache(any_model, plan), whole, [prompt.shape[1], 1])[:, -2:]
        close(torch.cat(logits), expected[0])


@pytest.mark.parametrize("least", [1, 8])
@pytest.mark.parametrize("name", ["full", "four-bits", "before-rope", "joined-with-keys"])
def test_a_tree_is_each_prompt_alone(name: str, least: int) -> None:
    model, prompts = models.double("llama"), family()
    plan, steps = plan_of(name, model), random_ids(len(prompts), STEPS, seed=40)
    branches = read(model, prompts, plan, least=least)
    assert sorted(index for branch in branches for index in branch.prompts) == list(range(len(prompts)))
    together = decoded(model, branches, prompts, steps)
    for index, prompt in enumerate(prompts):
        if name == "full":
            close(together[index], alone(model, plan, prompt, steps[index]))
        else:  # a chunk of a prompt sees raw what came with it: the same chunks alone
            close(together[index], chunked(model, plan, prompts, index, steps[index], least))


def chunked(
    model: Model, plan: Plan | None, prompts: list[torch.Tensor], index: int, steps: torch.Tensor, least: int
) -> torch.Tensor:
    """`alone`, of one of the prompts, fed node by node."""
    nodes, sizes = tree([prompt[:-1] for prompt in prompts], least), []
    (at,) = [number for number, node in enumerate(nodes) if index in node.ends]
    while at >= 0:
        sizes.append(len(nodes[at].tokens))
        at = nodes[at].parent
    whole = torch.cat([prompts[index], steps])[None]
    chunks = [*(size for size in sizes[::-1] if size), *[1] * (1 + STEPS)]
    return fed_alone(model, SegmentCache(model, plan), whole, chunks)[0, len(prompts[index]) - 1 :]


def test_what_is_shared_is_held_once_and_read_once(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = family()
    branches = read(llama, prompts, least=8)
    caches = [branch.cache for branch in branches]
    tokens = sum(len(node.tokens) for node in tree([prompt[:-1] for prompt in prompts], 8))
    g = llama.geometry
    entry = 2 * g.layers * g.kv_heads * g.head_dim * 4
    assert tokens * entry <= held(caches) < 0.7 * sum(held([cache]) for cache in caches)
    seen, plain = [], Shared.attend

    def watch(shared: Shared, q: torch.Tensor, step: Step) -> Partial:
        if shared not in step.given:
            seen.append(shared.length)
        return plain(shared, q, step)

    monkeypatch.setattr(Shared, "attend", watch)
    decoded(llama, branches, prompts, random_ids(len(prompts), STEPS))
    assert sorted(seen) == sorted([20, 8, 20] * g.layers * (1 + STEPS))  # trunk, limb, and what two prompts end with


def test_a_root_that_is_there_already(llama: Model) -> None:
    document, prompts = random_ids(1, 40, seed=50), family()
    steps = random_ids(len(prompts), STEPS, seed=40)
    root = SegmentCache(llama)
    fed_alone(llama, root, document, [40])
    together = decoded(llama, read(llama, prompts, root=root, least=4), prompts, steps)
    for index, prompt in enumerate(prompts):
        whole = torch.cat([document[0], prompt])
        close(together[index], alone(llama, None, whole, steps[index]))


def test_a_branch_of_one_row_keeps_its_prefix_as_it_was(llama: Model) -> None:
    """Wider branches of a branch leave its own number of rows alone."""
    root = SegmentCache(llama)
    fed_alone(llama, root, random_ids(1, 12), [12])
    second = SegmentCache(llama, prefix=root)
    fed_alone(llama, second, random_ids(1, 5), [5])
    third = SegmentCache(llama, prefix=second)
    fed_alone(llama, third, random_ids(3, 4), [4])
    assert [next(cache._all()).recall()[0].shape[0] for cache in (second, third)] == [1, 3]


def test_refused(llama: Model) -> None:
    with pytest.raises(InputError, match="empty prompt"):
        read(llama, [random_ids(1, 3)[0], torch.empty(0, dtype=torch.long)])
    with pytest.raises(InputError, match="another model"):
        feed(llama, [SegmentCache(models.build("llama", seed=1))], [random_ids(1, 3)])
