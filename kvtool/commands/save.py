"""`kvtool save`: a model reads a document, and what a plan holds of it becomes a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvtool import files, plan, snapshot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.commands._console import note, progress
from kvtool.commands._shelf import find
from kvtool.commands.inspect import sizes
from kvtool.corpus.sources import documents
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.plan import Plan


def run(
    name: str, document: str, plan_path: str | None, output: str | None, tokens: int, strict: bool, chunk: int,
    device: str, dtype: str, force: bool,
) -> dict[str, Any]:  # fmt: skip
    """Returns the record that `--json` prints."""
    if tokens < 0 or chunk < 0:
        raise InputError("bad --tokens or --chunk", got=f"{tokens} and {chunk}", expected="0 or more")
    output = output or f"{'stdin' if document == '-' else Path(document).stem}.kv.safetensors"
    files.check_output(output, force=force)
    chosen = None if plan_path is None else plan.read(find(plan_path))
    text = _text(document)
    model = load(name, dtype=dtype, device=device)
    ids = torch.tensor([*model.start, *model.ids(text).tolist()])[: tokens or None]
    made = chosen or Plan("full", model.fingerprint)
    cache = SegmentCache(model, made, protocol="strict" if strict else "official", prompt_length=len(ids))
    _read(model, cache, ids, chunk)
    facts = snapshot.save(output, model, cache, ids, document=document, force=force)
    size = None if output == "-" or files.is_stream(Path(output)) else Path(output).stat().st_size
    note(f"{document}: {len(ids)} tokens under {made.method}")
    sizes(facts.raw, facts.held, size)
    return {
        "output": output, "kind": "snapshot", "method": made.method, "document": document, "tokens": len(ids),
        "bytes": {"raw": facts.raw, "held": facts.held, "file": size},
    }  # fmt: skip


def _text(source: str) -> str:
    """The one document of a source; of the default text the first one that nothing is calibrated on."""
    if source == "default":
        return documents(source, half="held-out")[0]
    found = documents(source)
    if len(found) != 1:
        raise InputError("a snapshot is of one document", got=f"{len(found)} in {source}", expected="a text file")
    return found[0]


def _read(model: Model, cache: SegmentCache, ids: torch.Tensor, chunk: int) -> None:
    pieces = ids.split(chunk or max(1, len(ids)))
    with progress("save", len(pieces)) as advance, model.served(), torch.no_grad():
        for piece in pieces:
            model.network.base_model(input_ids=piece[None].to(model.device), past_key_values=cache)
            advance("")
