"""One prefix held once for many continuations against a cache of its own for each row: same tokens first, then decode
steps, which take turns, and bytes."""

from __future__ import annotations

import sys
from functools import partial

import torch
from _harness import medians, table

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.text import text
from kvtool.model import Model, load

PREFIX, OWN, TOKENS, REPEATS = 4000, 16, 4, 15
ROWS = (1, 16)


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


def main() -> None:
    model, rows = load("smollm2"), []
    samples = text(model, ["default"], tokens=PREFIX + OWN * max(ROWS), samples=1).samples
    ids = samples[0].tokens[None]
    prefix = SegmentCache(model)
    forward(model, ids[:, :PREFIX], prefix)
    for count in ROWS:
        own = ids[0, PREFIX : PREFIX + OWN * count].reshape(count, OWN)
        separate = SegmentCache(model)  # what each row would hold after a prefill of its own
        separate.adopt(prefix)
        separate.batch_repeat_interleave(count)
        sides = {"separate": separate, "shared": SegmentCache(model, prefix=prefix)}
        tokens = {name: written(model, cache, own) for name, cache in sides.items()}
        if not torch.equal(tokens["separate"], tokens["shared"]):
            sys.exit(f"parity: tokens differ with {count} continuations")
        token = tokens["shared"][:, -1:]
        times = medians({name: partial(forward, model, token, cache) for name, cache in sides.items()}, REPEATS)
        held = {name: cache.nbytes / 1e6 for name, cache in sides.items()}
        rows.append((
            count, times["separate"] * 1e3, times["shared"] * 1e3, f"{times['shared'] / times['separate']:.2f}×",
            held["separate"], held["shared"], f"{held['shared'] / held['separate']:.2f}×",
        ))  # fmt: skip
    columns = ("continuations", "separate step, ms", "shared, ms", "ratio", "separate held, MB", "shared, MB", "ratio")
    table(f"A shared prefix of {PREFIX} tokens, {TOKENS} greedy tokens equal", columns, rows)


if __name__ == "__main__":
    main()
