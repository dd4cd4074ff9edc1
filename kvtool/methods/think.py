"""ThinK: keep the key channels that matter to the prompt's last queries.

Xu et al., arXiv 2407.21018, ICLR 2025, section 3.

    score of channel c of a KV head = mean over the last w queries of its group of q_c² · mean over all keys of k_c²
    (keys after RoPE);  the ⌊pruned · D⌋ channels with the lowest scores go, the query meets only the others

A channel's logits are of rank one, so this score is ‖q_c k_cᵀ‖² up to a constant: the greedy choice that ignores what
channels do together. The scale stays 1/√D. Values stay whole, so that `pruned` saves half of it of the cache.
`mode=calibrated` takes the mean squares from texts and prunes the same channels in every prompt.

Departures from the released code: one choice per KV head over all queries of its group, as the authors' version for a
library of presses has it (theirs chooses for each query head, and holds a copy of the keys for each); the keys that
score are those that leave the window with the prompt, its recent ones, which stay whole, aside; new entries are pruned
when they leave the window, in the prompt's basis; any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Strongest
from kvtool.encoding.transforms import Gather
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share
from kvtool.slots import RAW, Store

STATISTICS = ("gram",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """pruned: share of the key channels that go. window: last queries of the prompt that score. recent: newest entries
    whose keys stay whole. block: entries that leave them together. mode: prompt, or calibrated for channels fixed
    beforehand."""

    pruned: float = 0.4
    window: int = 32
    recent: int = 32
    block: int = 32
    mode: Literal["prompt", "calibrated"] = "prompt"


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """Only keys get smaller: below one half most of their channels go."""
    return {"pruned": min(0.9, 2 * (1 - budget))}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    count = g.head_dim - int(share(options.pruned, "pruned") * g.head_dim)
    if count < 1:
        raise InputError("no channel is left", got=f"pruned {options.pruned}", expected="below 1")
    windows = options.recent, options.block
    if count == g.head_dim:
        nothing = torch.full((g.layers, g.kv_heads), RAW, dtype=torch.int32)
        return Decision(store=Store((), (), nothing, 0, *windows))
    if options.mode == "prompt":
        keys: tuple[Encoding, ...] = (Encoding(transforms=(Strongest(count, options.window),)),)
        index = torch.zeros(g.layers, g.kv_heads, dtype=torch.int32)
        return Decision(store=Store(keys, (Encoding(),), index, 0, *windows))
    gram = context.seen["gram"]
    queries, held = (gram[side].diagonal(dim1=-2, dim2=-1) for side in ("q", "k"))
    score = queries * held  # [L,K,D]
    kept = score.topk(count, dim=-1).indices.sort(-1).values
    keys = tuple(Encoding(transforms=(Gather(layer, g.head_dim),)) for layer in kept)
    index = torch.arange(g.layers, dtype=torch.int32)[:, None].repeat(1, g.kv_heads)
    return Decision(store=Store(keys, (Encoding(),) * g.layers, index, 0, *windows), evidence={"score": score.float()})
