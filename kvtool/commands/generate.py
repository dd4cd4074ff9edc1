"""`kvtool generate`: text that goes on from one snapshot or several, the most likely token at each step."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, get_args

import torch

from kvtool import plan, snapshot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.documents import beside
from kvtool.commands._console import note, progress
from kvtool.commands._shelf import find
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.plan import Plan
from kvtool.slots import Position
from kvtool.snapshot import Opened


def run(
    name: str, paths: Sequence[str], prompt: str, plan_path: str | None, position: str | None, tokens: int, device: str,
    dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Returns the record that `--json` prints; `text` is what is printed otherwise."""
    if tokens < 1:
        raise InputError("bad --tokens", got=tokens, expected="1 or more")
    if position not in (None, *get_args(Position)):
        raise InputError("bad --position", got=position, expected=" or ".join(get_args(Position)))
    if [*paths, prompt, plan_path].count("-") > 1:
        raise InputError("stdin cannot carry the snapshot and the prompt", got="- twice", remedy="name one of them")
    text = sys.stdin.read() if prompt == "-" else prompt
    chosen = None if plan_path is None else plan.read(find(plan_path))
    model = load(name, dtype=dtype, device=device)
    ids = model.ids(text)
    if not len(ids):
        raise InputError("an empty prompt", expected="what follows the document")
    _ = model.fingerprint  # found out before the clock runs
    seconds, start = {}, time.perf_counter()
    if len(paths) == 1 and chosen is None:
        cache = snapshot.load(paths[0], model)
        held = cache.segments[0].columns
    else:
        cache, held = _together(model, paths, chosen, position, len(ids))
    seconds["load"] = time.perf_counter() - start
    made = _greedy(model, cache, ids, tokens, seconds)
    told = paths[0] if len(paths) == 1 else f"{len(paths)} snapshots"
    note(f"{told}: {held} tokens, loaded in {seconds['load']:.2f} s; first token after {seconds['prompt']:.2f} s more")
    return {
        "snapshots": list(paths), "held": held, "prompt": text, "text": model.tokenizer.decode(made), "ids": made,
        "seconds": seconds,
    }  # fmt: skip


def _together(
    model: Model, paths: Sequence[str], chosen: Plan | None, position: str | None, prompt: int
) -> tuple[SegmentCache, int]:
    """A cache that stands after all of these snapshots, and how many tokens of documents they hold."""
    files = [snapshot.opened(path, model) for path in paths]
    prefix, documents = _prefix(model, paths, files)
    cache = SegmentCache(model, chosen, prompt_length=prompt)
    mode: Position | None = "contiguous" if position == "contiguous" else "shared" if position else None
    beside(model, cache, prefix, [document.cache for document in documents], position=mode)
    return cache, sum(len(document.tokens) for document in documents)


def _prefix(
    model: Model, paths: Sequence[str], files: Sequence[Opened]
) -> tuple[SegmentCache | None, Sequence[Opened]]:
    """The shared prefix, from a file if one of them holds it, and the files that hold documents."""
    after = next((file.prefix for file in files if len(file.prefix)), None)
    if after is None:
        return None, files
    documents = [file for file in files if not torch.equal(file.tokens, after) or len(file.prefix)]
    for path, file in zip(paths, files, strict=True):
        if any(file is document for document in documents) and not torch.equal(file.prefix, after):
            raise InputError(
                "documents were read after different prefixes", got=f"{path}: {len(file.prefix)} tokens of another",
                expected=f"the {len(after)} tokens of the others", remedy="save all with the same --prefix",
            )  # fmt: skip
    whole = [file for file in files if not any(file is document for document in documents)]
    return (whole[0].cache if whole else documents[0].made_prefix(model)), documents


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
    """ids int64 [T] → the most likely next one, [1]. Positions go on from those that the documents had."""
    first = cache.segments[0].place
    positions = torch.arange(first, first + len(ids), device=model.device)
    logits = model.network(
        input_ids=ids[None].to(model.device), position_ids=positions[None], past_key_values=cache, logits_to_keep=1
    ).logits
    return logits[0, -1:].argmax(-1).cpu()
