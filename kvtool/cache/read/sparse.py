"""Sparse prefill: which entries each block of a chunk's queries reads, for one layer.

    what heads hold, and the chunk → a rule ranks earlier entries → sinks, the best, local ones → `Chosen`

Blocks lie at multiples of their length, counted from a row's first token, and a choice depends on nothing after the
block. So chunks that end where blocks do give what the prompt at once gives, if the rule looks at blocks alone (`units`
does, rules that look at a chunk's last queries or its probes do not), if no boundary is a label, if entries are held as
they came, and if the prompt's length is known: its last queries are counted from there, and a budget that is a share is
one of it. Where it is not known, each chunk is taken for the prompt's end. A block that a chunk cuts in two chooses
twice, by half of its queries each time. So whoever feeds prompts asks `SegmentCache.at_once`.

Under the protocol "strict" prefill is decode, and nothing here acts. The same holds for heads with a window, of the
plan or the model's own, and once entries have gone: a chunk then reads all that is left. It keeps nothing between
calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kvtool import registry
from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Lane, Step
from kvtool.cache.read.board import Board
from kvtool.cache.read.boundaries import _base as boundaries
from kvtool.cache.read.chosen import Block, Chosen
from kvtool.cache.read.prefills._base import Job
from kvtool.rotary import Rotary
from kvtool.slots import Prefill


class Sparse:
    """`prompt_length`: columns of the prompt, padding included, where it is known."""

    def __init__(self, spec: Prefill, layer: int, prompt_length: int | None, rotary: Rotary, board: Board):
        self.spec, self.layer, self.prompt_length, self.rotary, self.board = spec, layer, prompt_length, rotary, board

    def choose(
        self, part: tuple[int, int], lanes: Sequence[Lane], q: torch.Tensor, k: torch.Tensor, step: Step
    ) -> Chosen | None:
        """What queries q [B,H,T,D] with keys k [B,K,T,D] of a layer read, where not everything; part: its number, and
        its padding."""
        bulks = [lane for lane in lanes if isinstance(lane, Bulk)]
        if step.strict or (q.shape[2] == 1 and step.start) or not bulks or not all(lane.listed for lane in bulks):
            return None
        heads = [head for lane in bulks for head in lane.heads]
        keys = torch.cat([_keys(lane, k, step.start) for lane in bulks], dim=1)
        q = q.unflatten(1, (k.shape[1], -1))[:, heads].flatten(1, 2)
        job = Job(self.spec, q, keys, step, self.rotary, self.layer, partial(self._cuts, part[0]))
        if self.spec.cut is not None and self.layer == self.spec.leader:
            rule = registry.module("cache/read/boundaries", self.spec.cut, "cut")
            self.board.boundaries[part[0]] = rule.values(job)
        unknown = self.spec.cut is not None and part[0] not in self.board.boundaries
        if unknown or not self.spec.acts(self.layer):
            return None
        return Chosen(tuple(self._blocks(job, self._length(part[1], job))), tuple(heads))

    def _length(self, padding: int, job: Job) -> int:
        """Tokens of the prompt, or of as much of it as is there."""
        return max(job.k.shape[2], 0 if self.prompt_length is None else self.prompt_length - padding)

    def _blocks(self, job: Job, length: int) -> list[Block]:
        spec, start, end = self.spec, job.start, job.k.shape[2]
        rule = registry.module("cache/read/prefills", spec.rule, "rule of a prefill").Rule(job)
        budget = spec.entries(self.layer, length)
        blocks: list[Block] = []
        dense, low = max(start, length - spec.dense), start
        while low < end:
            high = end if low >= dense else min(end, (low // spec.block + 1) * spec.block, dense)
            near = max(0, low - spec.local)
            first = min(spec.sink, near)
            count = max(0, budget - first - (low - near))
            whole = low >= dense or (count >= near - first and (not spec.mass or near == first))
            if whole and blocks and blocks[-1].near == 0 and blocks[-1].index is None:
                blocks[-1] = Block(blocks[-1].low, high - start, 0)
            elif whole:
                blocks.append(Block(low - start, high - start, 0))
            else:
                blocks.append(Block(low - start, high - start, near, self._listed(rule, low, high, first, near, count)))
            low = high
        return blocks

    def _listed(self, rule, low: int, high: int, first: int, near: int, count: int) -> torch.Tensor:
        """Sinks, and what the rule picks."""
        picked = rule.pick(low, high, first, near, min(count, near - first))
        sinks = torch.arange(first, device=picked.device).expand(*picked.shape[:2], -1)
        return torch.cat([sinks, picked], dim=2)

    def _cuts(self, part: int, low: int, first: int, near: int) -> torch.Tensor:
        """As `Job.cuts`."""
        spec = self.spec
        if spec.cut is None:
            return torch.tensor([[first, *range((first // spec.unit + 1) * spec.unit, near, spec.unit)]])
        known = self.board.boundaries[part][:, : max(0, low - spec.window + 1)]  # what lies ahead has no say
        if (part, low) not in self.board.cuts:
            most = spec.most * low // spec.block
            self.board.cuts[part, low] = boundaries.chosen(known, spec.above, spec.apart, most)
        return boundaries.begins(self.board.cuts[part, low], first, near)


def _keys(lane: Bulk, k: torch.Tensor, start: int) -> torch.Tensor:
    """Keys of all entries of a lane, those of the chunk k [B,K,T,D] among them."""
    own = k[:, lane.at]
    return torch.cat([lane.recall()[0], own], dim=2) if start else own
