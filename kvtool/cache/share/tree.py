"""What prompts have in common from their first token on: a tree, each of whose nodes is read and held once.

    node: tokens that all prompts below it go on with;  a prompt = the nodes from its root down, one behind the other

Hydragen's hierarchy (arXiv 2402.05099): level i has s_i nodes, of any lengths, below each of which are the prompts that
begin alike. Beginnings shorter than `least` tokens are not worth a node, since every node is a segment of its own to
merge. `read` makes the caches: every node that prompts share branches from its parent's cache and is fed in one pass
with the others of its level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtool.cache.segment_cache import Protocol, SegmentCache
from kvtool.cache.share.together import feed
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.packing import bins
from kvtool.plan import Plan

LEAST = 16  # tokens that are worth a node of their own
ROW = 2048  # tokens of nodes that are read in one pass


@dataclass(frozen=True)
class Node:
    """tokens: int64 [n]; parent: the number of the node before it, −1 none; ends: the prompts that end with it."""

    tokens: torch.Tensor
    parent: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """A cache, and the prompts that its rows hold, all but their last tokens."""

    cache: SegmentCache
    prompts: tuple[int, ...]


def tree(prompts: Sequence[torch.Tensor], least: int = LEAST) -> list[Node]:
    """The nodes of prompts int64 [n_i], parents before children."""
    nodes: list[Node] = []
    _grow(nodes, prompts, list(range(len(prompts))), 0, -1, max(1, least))
    return nodes


def _grow(
    nodes: list[Node], prompts: Sequence[torch.Tensor], members: list[int], start: int, parent: int, least: int
) -> None:
    """Nodes for what these prompts have from `start` on."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in members:
        groups.setdefault(tuple(prompts[index][start : start + least].tolist()), []).append(index)
    for group in groups.values():
        end = min(len(prompts[index]) for index in group)
        rows = torch.stack([prompts[index][start:end] for index in group])
        end = start + int((rows == rows[0]).all(0).long().cumprod(0).sum())
        ends = tuple(index for index in group if len(prompts[index]) == end)
        nodes.append(Node(prompts[group[0]][start:end], parent, ends))
        rest = [index for index in group if index not in ends]
        if rest:
            _grow(nodes, prompts, rest, end, len(nodes) - 1, least)


def read(
    model: Model,
    prompts: Sequence[torch.Tensor],
    plan: Plan | None = None,
    *,
    root: SegmentCache | None = None,
    least: int = LEAST,
    protocol: Protocol = "official",
) -> list[Branch]:
    """Caches of prompts int64 [n_i], of which what they share is held once; their last tokens are still to be fed.

    They go on from `root`, if there is one, under its plan and protocol. A plan that selects by a score does so where
    nothing is shared yet: among the tokens of each first node, or of the root.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise InputError("an empty prompt", expected="one token or more")
    if root is not None:
        root.finish()
    nodes = tree([prompt[:-1] for prompt in prompts], least)
    parents = {node.parent for node in nodes}
    caches: dict[int, SegmentCache] = {}  # of the nodes that several prompts share
    found: list[Branch] = []
    level = [index for index, node in enumerate(nodes) if node.parent < 0]
    while level:
        sources: dict[tuple[int, ...], list[int]] = {}
        for index in level:  # prompts that nothing follows and that are equally long go on as rows of one cache
            node = nodes[index]
            shared = index in parents or len(node.ends) > 1 or (root is None and node.parent < 0)
            sources.setdefault((index,) if shared else (node.parent, len(node.tokens), -1), []).append(index)
        pieces: list[tuple[SegmentCache, torch.Tensor]] = []
        for group in sources.values():
            first = nodes[group[0]]
            cache = _branch(model, caches.get(first.parent, root), plan, protocol, len(first.tokens))
            pieces.append((cache, torch.stack([nodes[index].tokens for index in group])))
            if group[0] in parents or len(first.ends) > 1:
                caches[group[0]] = cache
            else:
                found.append(Branch(cache, tuple(nodes[index].ends[0] for index in group)))
        _fed(model, [(cache, piece) for cache, piece in pieces if piece.shape[1]])
        for index in level:
            if index in caches and nodes[index].ends:
                again = len(nodes[index].tokens) > 0 or root is not None
                cache = _branch(model, caches[index], plan, protocol, 0) if again else caches[index]
                found.append(Branch(cache, nodes[index].ends))
        level = [index for index, node in enumerate(nodes) if node.parent in level]
    return found


def _fed(model: Model, pieces: list[tuple[SegmentCache, torch.Tensor]]) -> None:
    """Feed every cache its piece, and let it be shared."""
    for row in bins([piece.numel() for _, piece in pieces], ROW):
        feed(model, [pieces[at][0] for at in row], [pieces[at][1] for at in row])
    for cache, _ in pieces:
        cache.finish()


def _branch(
    model: Model, before: SegmentCache | None, plan: Plan | None, protocol: Protocol, length: int
) -> SegmentCache:
    if before is None:
        return SegmentCache(model, plan, protocol=protocol, prompt_length=length)
    return SegmentCache(model, before.plan, protocol=before.protocol, prefix=before)
