"""`kvtool generate`: text that goes on from a snapshot, the most likely token at each step."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from kvtool import snapshot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.commands._console import note, progress
from kvtool.errors import InputError
from kvtool.model import Model, load


def run(name: str, path: str, prompt: str, tokens: int, device: str, dtype: str) -> dict[str, Any]:
    """Returns the record that `--json` prints; `text` is what is printed otherwise."""
    if tokens < 1:
        raise InputError("bad --tokens", got=tokens, expected="1 or more")
    if prompt == "-" and path == "-":
        raise InputError("stdin cannot carry the snapshot and the prompt", got="- twice", remedy="name one of them")
    text = sys.stdin.read() if prompt == "-" else prompt
    model = load(name, dtype=dtype, device=device)
    ids = model.ids(text)
    if not len(ids):
        raise InputError("an empty prompt", expected="what follows the document")
    _ = model.fingerprint  # found out before the clock runs
    seconds, start = {}, time.perf_counter()
    cache = snapshot.load(path, model)
    seconds["load"], held = time.perf_counter() - start, cache.segments[0].columns
    made = _greedy(model, cache, ids, tokens, seconds)
    note(f"{path}: {held} tokens, loaded in {seconds['load']:.2f} s; first token after {seconds['prompt']:.2f} s more")
    return {
        "snapshot": path, "held": held, "prompt": text, "text": model.tokenizer.decode(made), "ids": made,
        "seconds": seconds,
    }  # fmt: skip


def _greedy(model: Model, cache: SegmentCache, ids: torch.Tensor, tokens: int, seconds: dict[str, float]) -> list[int]:
    """The next tokens, at most so many, up to the end of the text; `seconds` gets those before the first."""
    made: list[int] = []
    start = time.perf_counter()
    with progress("generate", tokens) as advance, model.served(), torch.no_grad():
        while len(made) < tokens:
            ids = _next(model, cache, ids)
            seconds.setdefault("prompt", time.perf_counter() - start)
            if ids.item() == model.tokenizer.eos_token_id:
                break
            made.append(int(ids))
            advance("")
    return made


def _next(model: Model, cache: SegmentCache, ids: torch.Tensor) -> torch.Tensor:
    """ids int64 [T] → the most likely next one, [1]. Positions go on from those that the document had."""
    layer = cache.segments[0]
    first = layer.parts[0].origin + layer.columns
    positions = torch.arange(first, first + len(ids), device=model.device)
    logits = model.network(
        input_ids=ids[None].to(model.device), position_ids=positions[None], past_key_values=cache, logits_to_keep=1
    ).logits
    return logits[0, -1:].argmax(-1).cpu()
