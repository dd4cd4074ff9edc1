"""The definition of what a plan's cache computes: one forward pass with explicit masks over all entries.

Shares nothing with the package but the plan: attention is registered here under a name of its own, rotations come from
transformers, and every query row is computed by itself from the set of entries it sees.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from kvtool.model import Model
from kvtool.plan import EVERYTHING, Plan

NAME = "dense-reference"


@dataclass
class _Run:
    plan: Plan | None
    start: list[int]  # of each row: columns fed before the row's chunk
    alone: list[bool]  # is the row a chunk of one token after a prompt (a decode step)?
    strict: bool
    tables: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


_run: _Run | None = None


def dense(
    model: Model, ids: torch.Tensor, plan: Plan | None, chunks: Sequence[int], *, strict: bool = False
) -> torch.Tensor:
    """Logits [T,V] of ids [T] as if fed in `chunks` to a cache that executes `plan`."""
    global _run
    start, alone, fed = [], [], 0
    for count in chunks:
        start += [fed] * count
        alone += [count == 1 and fed > 0] * count
        fed += count
    _run = _Run(plan, start, alone, strict)
    try:
        with _served(model.network, _run), torch.no_grad():
            return model.network(input_ids=ids[None]).logits[0]
    finally:
        _run = None


@contextmanager
def _served(network: Any, run: _Run) -> Iterator[None]:
    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_embeddings") is not None:
            run.tables[module] = kwargs["position_embeddings"]

    before = network.config._attn_implementation
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in network.modules()]
    network.set_attn_implementation(NAME)
    try:
        yield
    finally:
        network.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def _attention(module: Any, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    run, layer = _run, module.layer_idx
    assert run is not None
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap, sink_logits = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
    keep = run.plan.keep if run.plan is not None else None
    out = torch.empty_like(query)
    for head in range(key.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        sink, recent, compensate = 0, EVERYTHING, False
        if keep is not None:
            sink, recent = int(keep.sink[layer, head]), int(keep.recent[layer, head])
            compensate = bool(keep.compensate[layer, head])
        everything = recent == EVERYTHING
        if window is not None:  # the model's own window allows no sinks, and nothing stands in for what leaves it
            sink, recent, compensate, everything = 0, window if everything else min(sink + recent, window), False, False
        for row in range(query.shape[2]):
            # entries sink … first − 1 were dropped before this row; the row sees all others up to its own
            first = row - recent + 1 if run.strict or run.alone[row] else run.start[row] - recent
            first = 0 if everything else max(first, 0)
            nearest = max(first, 0 if window is None else row - window + 1)
            seen = [j for j in range(row + 1) if j < sink or j >= nearest]
            dropped = list(range(sink, first))
            q, k, v = query[:, heads, row : row + 1], key[:, head : head + 1, seen], value[0, head, seen].float()
            if keep is not None and keep.position == "reindex" and dropped:
                place = torch.tensor([j if j < sink else j - len(dropped) for j in seen])
                q_turned = _moved(module, run, q, torch.tensor([row]), torch.tensor([row - len(dropped)]))
                logits = q_turned[0, :, 0].float() @ _moved(module, run, k, torch.tensor(seen), place)[0, 0].float().T
            else:
                logits = q[0, :, 0].float() @ k[0, 0].float().T
            if compensate and dropped:
                mean = key[0, head, dropped].float().mean(0)
                logits = torch.cat([logits, (q[0, :, 0].float() @ mean)[:, None]], dim=1)
                v = torch.cat([v, value[0, head, dropped].float().mean(0)[None]])
            logits = logits * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if compensate and dropped:
                logits[:, -1] += torch.tensor(float(len(dropped))).log()
            if sink_logits is not None:
                logits = torch.cat([logits, sink_logits[heads, None].float()], dim=1)
            out[0, heads, row] = (torch.softmax(logits, dim=1)[:, : len(v)] @ v).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _moved(module: Any, run: _Run, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x [1,H,T,D] rotated for positions `source` → for positions `target`, by the architecture's own RoPE."""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    cos, sin = run.tables[module]
    factor = float(cos[0, 0, 0] ** 2 + sin[0, 0, 0] ** 2)  # of RoPE scalings that also stretch
    bare = rotate(x, x, cos[:, source], -sin[:, source])[0] / factor
    return rotate(bare, bare, cos[:, target], sin[:, target])[0]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
