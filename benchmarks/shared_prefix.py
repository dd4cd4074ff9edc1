"""One prefix held once for many continuations against a cache of its own for each row: same tokens first, then decode
steps, which take turns, and bytes.

Rows with caches of their own are decoded one after another ("one by one"), or as one batch, whose rows share the
model's linear layers ("as a batch"). With `--levels` the prefix is a tree: a trunk of half its tokens, and a limb of
the other half for every four continuations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from _harness import medians, table

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.together import feed, held
from kvtool.corpus.text import text
from kvtool.model import Model, load

PREFIX, OWN, TOKENS, REPEATS = 4000, 16, 4, 15
ROWS, FANOUT = (1, 16), 4


def forward(model: Model, ids: torch.Tensor, cache: SegmentCache) -> torch.Tensor:
    """One pass; the greedy tokens [B,1] that follow."""
    with model.served(), torch.no_grad():
        out = model.network(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1)


def written(model: Model, cache: SegmentCache, own: torch.Tensor) -> torch.Tensor:
    """Greedy tokens [B,TOKENS] after the continuations [B,T]."""
    tokens = [forward(model, own, cache)]
    while len(tokens) < TOKENS:
        tokens.append(forward(model, tokens[-1], cache))
    return torch.cat(tokens, dim=1)


def rows_apart(model: Model, prefix: SegmentCache, count: int) -> SegmentCache:
    """What `count` rows would hold after a prefill of their own."""
    made = SegmentCache(model)
    made.adopt(prefix)
    made.batch_repeat_interleave(count)
    return made


def one_by_one(model: Model, caches: list[SegmentCache], token: torch.Tensor) -> None:
    for row, cache in enumerate(caches):
        forward(model, token[row : row + 1], cache)


def flat(model: Model, ids: torch.Tensor) -> list[tuple[object, ...]]:
    """One level: every row goes on from the same prefix."""
    rows: list[tuple[object, ...]] = []
    prefix = SegmentCache(model)
    forward(model, ids[:, :PREFIX], prefix)
    for count in ROWS:
        own = ids[0, PREFIX : PREFIX + OWN * count].reshape(count, OWN)
        batch, single = rows_apart(model, prefix, count), [rows_apart(model, prefix, 1) for _ in range(count)]
        sides = {"batch": batch, "shared": SegmentCache(model, prefix=prefix)}
        tokens = {name: written(model, cache, own) for name, cache in sides.items()}
        if not torch.equal(tokens["batch"], tokens["shared"]):
            sys.exit(f"parity: tokens differ with {count} continuations")
        token = tokens["shared"][:, -1:]
        for row, cache in enumerate(single):
            written(model, cache, own[row : row + 1])
        work: dict[str, Callable[[], object]] = {
            name: partial(forward, model, token, cache) for name, cache in sides.items()
        }
        times = medians(work | {"single": partial(one_by_one, model, single, token)}, REPEATS)
        rows.append(row_of(count, 1, times, batch.nbytes, sides["shared"].nbytes))
    return rows


def tree(model: Model, ids: torch.Tensor) -> list[tuple[object, ...]]:
    """Two levels, FANOUT continuations below each limb."""
    trunk, half = SegmentCache(model), PREFIX // 2
    forward(model, ids[:, :half], trunk)
    own = ids[0, PREFIX : PREFIX + OWN * max(ROWS)].reshape(-1, FANOUT, OWN)
    shared, batch = [], []
    for number in range(len(own)):
        limb = ids[:, half:PREFIX].roll(number * OWN, 1)
        whole = SegmentCache(model)
        forward(model, torch.cat([ids[:, :half], limb], 1), whole)
        batch.append(rows_apart(model, whole, FANOUT))
        branch = SegmentCache(model, prefix=trunk)
        forward(model, limb, branch)
        shared.append(SegmentCache(model, prefix=branch))
    tokens = []
    for caches in (batch, shared):
        found = [feed(model, caches, list(own))]
        while len(found) < TOKENS:
            found.append(feed(model, caches, [x.argmax(-1, keepdim=True) for x in found[-1]]))
        tokens.append(torch.stack([torch.cat([x.argmax(-1) for x in step]) for step in found], 1))
    if not torch.equal(*tokens):
        sys.exit("parity: tokens differ below a tree")
    last = list(tokens[1][:, -1:].split(FANOUT))
    times = medians({
        "batch": partial(feed, model, batch, last), "shared": partial(feed, model, shared, last),
    }, REPEATS)  # fmt: skip
    return [row_of(max(ROWS), 2, times, held(batch), held(shared))]


def row_of(count: int, levels: int, times: dict[str, float], apart: int, shared: int) -> tuple[object, ...]:
    single = times.get("single")
    return (
        count, levels, "" if single is None else single * 1e3, times["batch"] * 1e3, times["shared"] * 1e3,
        "" if single is None else f"{times['shared'] / single:.2f}×", f"{times['shared'] / times['batch']:.2f}×",
        apart / 1e6, shared / 1e6, f"{shared / apart:.2f}×",
    )  # fmt: skip


def main() -> None:
    model = load("smollm2")
    ids = text(model, ["default"], tokens=PREFIX + OWN * max(ROWS), samples=1).samples[0].tokens[None]
    rows = tree(model, ids) if "--levels" in sys.argv[1:] else flat(model, ids)
    columns = (
        "continuations", "levels", "one by one, ms", "as a batch, ms", "shared, ms", "÷ one by one", "÷ batch",
        "held apart, MB", "shared, MB", "ratio",
    )  # fmt: skip
    table(f"A shared prefix of {PREFIX} tokens, {TOKENS} greedy tokens equal", columns, rows)


if __name__ == "__main__":
    main()
