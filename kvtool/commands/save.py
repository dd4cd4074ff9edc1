"""`kvtool save`: a model reads a document, and what a plan holds of it becomes a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvtool import files, plan, snapshot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share import documents
from kvtool.commands._console import note, progress
from kvtool.commands._shelf import find
from kvtool.commands.inspect import sizes
from kvtool.corpus import sources
from kvtool.errors import InputError
from kvtool.model import load
from kvtool.plan import Plan


def run(
    name: str, document: str, plan_path: str | None, prefix: str | None, output: str | None, tokens: int, strict: bool,
    chunk: int, device: str, dtype: str, force: bool,
) -> dict[str, Any]:  # fmt: skip
    """Returns the record that `--json` prints."""
    if tokens < 0 or chunk < 0:
        raise InputError("bad --tokens or --chunk", got=f"{tokens} and {chunk}", expected="0 or more")
    files.one_stdin(document, prefix, plan_path)
    title = "stdin" if document == "-" else document
    output = output or f"{Path(title).stem}.kv.safetensors"
    files.check_output(output, force=force)
    chosen = None if plan_path is None else plan.read(find(plan_path))
    text, before = _text(document), "" if prefix is None else _text(prefix)
    model = load(name, dtype=dtype, device=device)
    first = torch.tensor([*model.start, *model.ids(before).tolist()] if before else [], dtype=torch.long)
    ids = torch.tensor([*([] if before else model.start), *model.ids(text).tolist()])[: tokens or None]
    made = chosen or Plan("full", model.fingerprint)
    shared = documents.read(model, SegmentCache(model), first) if before else None
    cache = SegmentCache(model, made, protocol="strict" if strict else "official", prompt_length=len(ids))
    documents.after(model, cache, shared)
    with progress("save", -(-len(ids) // (chunk or max(1, len(ids))))) as advance:
        documents.read(model, cache, ids, chunk, lambda: advance(""))
    facts = snapshot.save(output, model, cache, ids, prefix=first, document=title, force=force)
    size = None if output == "-" or files.is_stream(Path(output)) else Path(output).stat().st_size
    note(f"{title}: {len(ids)} tokens under {made.method}" + (f", after a prefix of {len(first)}" if before else ""))
    sizes(facts.raw, facts.held, size)
    return {
        "output": output, "kind": "snapshot", "method": made.method, "document": title, "tokens": len(ids),
        "prefix": len(first), "identity": facts.identity,
        "bytes": {"raw": facts.raw, "held": facts.held, "file": size},
    }  # fmt: skip


def _text(source: str) -> str:
    """The one document of a source; of the default text the first one that nothing is calibrated on."""
    if source == "default":
        return sources.documents(source, half="held-out")[0]
    found = sources.documents(source)
    if len(found) != 1:
        raise InputError("a snapshot is of one document", got=f"{len(found)} in {source}", expected="a text file")
    return found[0]
