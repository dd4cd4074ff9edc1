"""The definition of what a plan's cache computes: one forward pass with explicit masks over all entries.

Shares nothing with the package but the plan: attention is registered here under a name of its own, rotations come from
transformers, and every query row is computed by itself from the set of entries it sees.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import EVERYTHING
from tests.laws import asking
from tests.laws.indexes import Looks
from tests.laws.reading import Posts, Reading
from tests.laws.scoring import Entry
from tests.laws.selecting import Selecting

NAME = "dense-reference"


@dataclass
class _Run:
    plan: Plan | None
    start: list[int]  # of each row: columns fed before the row's chunk
    alone: list[bool]  # is the row a chunk of one token after a prompt (a decode step)?
    strict: bool
    prompt_length: int | None
    prompt: int  # the first row that is a decode step: what comes before it is the prompt
    tokens: list[int]
    tables: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    posts: Posts = field(default_factory=dict)


_run: _Run | None = None


def dense(
    model: Model,
    ids: torch.Tensor,
    plan: Plan | None,
    chunks: Sequence[int],
    *,
    strict: bool = False,
    prompt_length: int | None = None,
) -> torch.Tensor:
    """Logits [T,V] of ids [T] as if fed in `chunks` to a cache that executes `plan`."""
    global _run
    start, alone, fed = [], [], 0
    for count in chunks:
        start += [fed] * count
        alone += [count == 1 and fed > 0] * count
        fed += count
    prompt = alone.index(True) if True in alone else len(alone)
    _run = _Run(plan, start, alone, strict, prompt_length, prompt, ids.tolist())
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


def _attention(  # noqa: C901 (the definition in one piece, to be read from top to bottom)
    module: Any, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
):
    run, layer = _run, module.layer_idx
    assert run is not None
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap, sink_logits = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
    keep = run.plan.keep if run.plan is not None else None
    out = torch.empty_like(query)
    if keep is not None and keep.dropped is not None and keep.dropped[layer]:
        return out.zero_().transpose(1, 2).contiguous(), None
    selecting = _selecting(module, run, query, key, value, scale, softcap) if window is None else None
    chosen = selecting.chosen(run.prompt) if selecting is not None and run.prompt <= key.shape[2] else {}
    entries = _seen(run, selecting, key.shape[2])
    orders = {head: _order(run, chosen.get(head), key.shape[2]) for head in range(key.shape[1])}
    stored = run.plan is not None and run.plan.store is not None
    coded = _coded(module, run, key, value, orders) if stored else {}
    for head in range(key.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        sink, recent, compensate = 0, EVERYTHING, False
        if keep is not None:
            sink, recent = int(keep.sink[layer, head]), int(keep.recent[layer, head])
            compensate = bool(keep.compensate[layer, head])
        everything = recent == EVERYTHING
        if window is not None:  # the model's own window allows no sinks, and nothing stands in for what leaves it
            sink, recent, compensate, everything = 0, window if everything else min(sink + recent, window), False, False
        reads = run.plan is not None and run.plan.read is not None and everything
        reading = Reading(run.plan, layer, head, scale, softcap, run.posts, run.tokens) if reads else None
        if reading is not None and run.plan.read.index is not None:
            told = [row for row in range(query.shape[2]) if run.strict or not (run.alone[row] and row)]
            reading.looks = Looks(run.plan.read, query[0, heads], told)
        if reading is not None and asking.needed(run.plan.read):
            move = functools.partial(_turned, module, run)
            reading.asks = asking.Asks(
                run.plan.read, layer, head, query[0], key[0], scale, softcap, run.alone, run.strict, move
            )
        for row in range(query.shape[2]):
            # entries sink … first − 1 were dropped before this row; the row sees all others up to its own
            first = row - recent + 1 if run.strict or run.alone[row] else run.start[row] - recent
            first = 0 if everything else max(first, 0)
            nearest = max(first, 0 if window is None else row - window + 1)
            seen = [j for j in range(row + 1) if j < sink or j >= nearest]
            if head in chosen and everything and row >= run.prompt:
                seen = [j for j in orders[head] if j <= row]
            dropped = list(range(sink, first))
            k_row, v_row = key[:, head : head + 1], value[:, head : head + 1]
            if head in coded and everything:
                back = _placed(module, run, row, coded[head])
                k_row, v_row = _as_seen(run, row, (k_row, v_row), back, orders[head], head in chosen)
            q, k, v = query[:, heads, row : row + 1], k_row[:, :, seen], _wide(v_row[0, 0, seen])
            if keep is not None and keep.position == "reindex" and dropped:
                place = torch.tensor([j if j < sink else j - len(dropped) for j in seen])
                q_turned = _moved(module, run, q, torch.tensor([row]), torch.tensor([row - len(dropped)]))
                logits = _wide(q_turned[0, :, 0]) @ _wide(_moved(module, run, k, torch.tensor(seen), place)[0, 0]).T
            else:
                logits = _wide(q[0, :, 0]) @ _wide(k[0, 0]).T
            if compensate and dropped:
                mean = _wide(key[0, head, dropped]).mean(0)
                logits = torch.cat([logits, (_wide(q[0, :, 0]) @ mean)[:, None]], dim=1)
                v = torch.cat([v, _wide(value[0, head, dropped]).mean(0)[None]])
            logits = logits * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if compensate and dropped:
                logits[:, -1] += torch.tensor(float(len(dropped))).log()
            waits = keep is not None and keep.select is not None and row < run.prompt  # a prompt to be selected from
            if reading is not None and (run.alone[row] or (run.strict and not waits)):
                raw, held = (key[0, head], value[0, head]), (k_row[0, 0], v_row[0, 0])
                logits, v = reading.row(row, seen, q[0, :, 0], raw, held, logits, v)
            if (head, row) in entries and everything:
                mine = entries[head, row]
                logits = scale * _wide(q[0, :, 0]) @ torch.stack([e.k for e in mine]).to(logits.dtype).T
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits = logits + torch.tensor([e.number for e in mine], dtype=logits.dtype).log()
                v = torch.stack([e.v for e in mine]).to(v.dtype)
            if sink_logits is not None:
                logits = torch.cat([logits, _wide(sink_logits[heads, None])], dim=1)
            out[0, heads, row] = (torch.softmax(logits, dim=1)[:, : len(v)] @ v).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _selecting(module: Any, run: _Run, query, key, value, scale: float, softcap: float | None) -> Selecting | None:
    keep = run.plan.keep if run.plan is not None else None
    if keep is None or keep.select is None:
        return None

    def move(k: torch.Tensor, source: int, target: int) -> torch.Tensor:
        return _moved(module, run, k[None, None, None], torch.tensor([source]), torch.tensor([target]))[0, 0, 0]

    turn = move if keep.position == "reindex" else None
    return Selecting(keep.select, module.layer_idx, query[0], key[0], value[0], scale, softcap, turn)


def _seen(run: _Run, selecting: Selecting | None, tokens: int) -> dict[tuple[int, int], list[Entry]]:
    """(KV head, row) → the entries that a row sees, where they are not just some of those that came."""
    if selecting is None or run.plan is None or run.plan.store is not None or run.plan.read is not None:
        return {}
    each = [row for row in range(tokens) if row == run.start[row] or (run.strict and row >= run.prompt)]
    if run.strict and selecting.spec.when != "step":
        each = [row for row in range(tokens) if row == run.start[row]]
    calls = [(low, high - low) for low, high in zip(each, [*each[1:], tokens], strict=True)]
    return selecting.run(calls, run.prompt, run.prompt_length or run.prompt)


def _order(run: _Run, chosen: list[int] | None, tokens: int) -> list[int]:
    """Every entry that ever stands in a head's list, in order."""
    return list(range(tokens)) if chosen is None else [*chosen, *range(run.prompt, tokens)]


def _coded(
    module: Any, run: _Run, key: torch.Tensor, value: torch.Tensor, orders: dict[int, list[int]]
) -> dict[int, tuple[torch.Tensor, ...]]:
    """KV head → its list's coded entries as the store gives them back, [1,1,n,D] each: whole blocks after the sinks.
    Keys, values, and where both are written together what is to be added to the keys, as it stands at position 0."""
    store, layer, found = run.plan.store, module.layer_idx, {}
    for number in store.index[layer].unique().tolist():
        heads = (store.index[layer] == number).nonzero().flatten().tolist()
        whole = min(max(0, len(orders[head]) - store.sink) // store.block * store.block for head in heads)
        if number < 0 or not whole:
            continue
        for group in (
            [heads] if store.keys[number].joined > 1 or store.values[number].joined > 1 else [[h] for h in heads]
        ):
            places, sides = torch.tensor(orders[group[0]][store.sink : store.sink + whole]), []
            if store.values[number].joint:
                held = [x[:, group][:, :, places] for x in (key, value)]
                entry = torch.cat([held[0], _moved(module, run, held[0], places, 0 * places), held[1]], -1)
                encoding = store.keys[number].heads(group, key.shape[1])
                blocks = [encoding.decode(encoding.encode(b), entry.shape[-1]) for b in entry.split(store.block, 2)]
                roped, bare, back = torch.cat(blocks, dim=2).to(key.dtype).chunk(3, -1)
                found |= {head: tuple(x[:, [at]] for x in (roped, back, bare)) for at, head in enumerate(group)}
                continue
            for encoding, x in (
                (store.keys[number].heads(group, key.shape[1]), key),
                (store.values[number].heads(group, key.shape[1]), value),
            ):
                held = x[:, group][:, :, places]
                stretch = _stretch(run.tables[module][0][:, :1] if not encoding.rotated else None, x)
                bare = held if encoding.rotated else _moved(module, run, held, places, 0 * places) / stretch
                blocks = [encoding.decode(encoding.encode(b), x.shape[-1]) for b in bare.split(store.block, 2)]
                back = torch.cat(blocks, dim=2).to(x.dtype)
                sides.append(back if encoding.rotated else _moved(module, run, back * stretch, 0 * places, places))
            for at, head in enumerate(group):
                found[head] = (sides[0][:, at : at + 1], sides[1][:, at : at + 1])
    return found


def _stretch(cosine: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What RoPE makes of a key at position 0, where nothing turns: a factor per channel, 1 unless it is scaled."""
    if cosine is None:
        return x.new_ones(1)
    return torch.nn.functional.pad(cosine, (0, x.shape[-1] - cosine.shape[-1]), value=1.0)[:, None]


def _placed(module: Any, run: _Run, row: int, coded: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as a row sees them: a key without RoPE stands wherever the row does."""
    k, v, *bare = coded
    for part in bare:
        here = torch.full((part.shape[2],), row)
        k = k + _moved(module, run, part, 0 * here, here)
    return k, v


def _as_seen(
    run: _Run, row: int, raw: tuple[torch.Tensor, torch.Tensor], coded: tuple[torch.Tensor, torch.Tensor],
    order: list[int], selected: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Keys and values as a row sees them: what had moved into the bulk before it, or before its chunk, is coded."""
    store = run.plan.store
    fed = row if run.strict else run.start[row]
    if selected and row < run.prompt:
        return list(raw)
    listed = sum(j < fed for j in order)
    count = max(0, listed - store.sink - store.recent) // store.block * store.block
    sides = [x.clone() for x in raw]
    for side, c in zip(sides, coded, strict=True):
        side[:, :, order[store.sink : store.sink + count]] = c[:, :, :count]
    return sides


def _moved(module: Any, run: _Run, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x [1,H,T,D] rotated for positions `source` → for positions `target`, by the architecture's own RoPE."""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    cos, sin = run.tables[module]
    length = _wide(cos[:, source] ** 2 + sin[:, source] ** 2)  # not 1 for RoPE scalings that also stretch
    if length.shape[-1] * 2 == x.shape[-1] and "gpt_oss" in type(module).__module__:  # one angle a pair there
        length = torch.cat([length, length], dim=-1)
    length = torch.nn.functional.pad(length, (0, x.shape[-1] - length.shape[-1]), value=1.0)
    bare = (_wide(rotate(x, x, cos[:, source], -sin[:, source])[0]) / length[:, None]).to(x.dtype)
    return rotate(bare, bare, cos[:, target], sin[:, target])[0]


def _turned(module: Any, run: _Run, x: torch.Tensor, source: list[int], target: list[int] | None) -> torch.Tensor:
    """x [n,D] rotated for positions `source` → for positions `target`, or None: not rotated."""
    to = torch.tensor([0] * len(source) if target is None else target)
    moved = _moved(module, run, x[None, None], torch.tensor(source), to)[0, 0]
    return moved / _stretch(run.tables[module][0][:, :1] if target is None else None, x).flatten()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
