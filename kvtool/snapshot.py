"""A snapshot is the cache of a document as a file: what a plan holds of it, for another run to go on from.

    save("document.kv.safetensors", model, cache, tokens)
    cache = load("document.kv.safetensors", model)

The cache that is loaded gives the logits that the saved one would have given, bit for bit: entries that a plan encodes
are held as their codes, which the file has entropy-coded (`encoding/squeeze.py`), all others as the model made them. So
a file belongs to one model in one dtype, and keys that were written after RoPE to the positions they had. The plan is
in the file, less its evidence. It knows neither plans nor parts of caches; see `cache/state.py`.

A document that was read after a shared prefix (see `cache/share/documents.py`) holds nothing of it: the file has the
prefix's tokens, from which it is made again:

    documents = [opened(path, model) for path in paths];   prefix = documents[0].made_prefix(model)
    cache = beside(model, SegmentCache(model), prefix, [document.cache for document in documents])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool import files, records
from kvtool.cache.part import Part
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.cache.share.documents import after, read
from kvtool.cache.state import Document, dump, fill
from kvtool.encoding.squeeze import Codes, expanded
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import SLOTS, Plan

SCHEMA = 2


@dataclass(frozen=True)
class Facts:
    """What a header says of the document: its name, the tokens that were fed, the hash of their ids, the position of
    the first one; bytes: its keys and values in 16 bits, and what the cache held; the hash of the prefix that it was
    read after, empty if none, and one of model, prefix and document together, the same for all of its plans."""

    document: str
    tokens: int
    hash: str
    origin: int
    raw: int
    held: int
    prefix: str
    identity: str


@dataclass(frozen=True)
class Opened:
    """A snapshot as it was read: its own entries; tokens int64 [T] and those of its prefix [P], P = 0 for none."""

    cache: SegmentCache
    tokens: torch.Tensor
    prefix: torch.Tensor
    facts: Facts

    def made_prefix(self, model: Model) -> SegmentCache | None:
        """A cache of the prefix, as it was when the document was read."""
        return read(model, SegmentCache(model), self.prefix) if len(self.prefix) else None


def save(
    path: str,
    model: Model,
    cache: SegmentCache,
    tokens: torch.Tensor,
    *,
    prefix: torch.Tensor | None = None,
    document: str = "",
    force: bool = False,
) -> Facts:
    """Write what `cache` holds of `tokens` int64 [T], all that it was fed, after the shared `prefix` int64 [P]."""
    cache.finish()
    prefix = torch.zeros(0, dtype=torch.long) if prefix is None else prefix
    _check_whole(cache, tokens, prefix)
    facts = _facts(model, cache, tokens, prefix, document)
    tensors: files.Tensors = {"tokens": tokens.int().cpu(), "prefix": prefix.int().cpu()}
    seen: set[int] = set()
    plan = cache.plan or Plan("full", model.fingerprint)
    try:
        layers = [
            records.dump(_state(layer, seen), f"layers.{index}", tensors) for index, layer in enumerate(cache.segments)
        ]
        header = {
            "kind": "snapshot",
            "schema": SCHEMA,
            "model": model.fingerprint,
            "source": model.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "protocol": cache.protocol,
            "prompt_length": cache.prompt_length,
            "document": vars(facts),
            "method": plan.method,
            "options": plan.options,
            "slots": {name: records.dump(getattr(plan, name), f"plan.{name}", tensors) for name in SLOTS},
            "layers": layers,
        }
    except TypeError as error:
        raise InputError("this plan's cache cannot be saved", got=str(error)) from error
    files.write(path, header, tensors, force=force)
    return facts


def load(path: str, model: Model) -> SegmentCache:
    """A cache that goes on from a snapshot, and from its prefix; raises InputError when it is another model's, or
    damaged."""
    document = opened(path, model)
    return after(model, document.cache, document.made_prefix(model))


def opened(path: str, model: Model) -> Opened:
    """A snapshot's own entries, apart from those of its prefix; raises InputError as `load` does."""
    header, tensors = files.read(path, kind="snapshot", schema=SCHEMA)
    try:
        facts = Facts(**header["document"])
        slots = {name: records.load(header["slots"][name], tensors) for name in SLOTS}
        plan = Plan(header["method"], header["model"], header["options"], **slots)
        _check(header, model)
        cache = SegmentCache(model, plan, protocol=header["protocol"], prompt_length=header["prompt_length"])
        for layer, document in zip(cache.segments, header["layers"], strict=True):
            _fill(layer, _placed(records.load(document, tensors), model.device))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is a damaged snapshot", got=f"{type(error).__name__}: {error}") from error
    cache.finished = True
    return Opened(cache, tensors["tokens"].long(), tensors["prefix"].long(), facts)


def _check_whole(cache: SegmentCache, tokens: torch.Tensor, prefix: torch.Tensor) -> None:
    """Raise InputError unless `cache` holds one sequence, these tokens, after this prefix and nothing else."""
    contexts = cache.segments[0].contexts if cache.segments else None
    more = any(layer.prefix or layer.inserted for layer in cache.segments)
    if not cache.single or more or (contexts and contexts.documents):
        raise InputError(
            "this cache cannot be saved", got="several sequences, padding, inserted entries, or what others hold too",
            expected="one sequence, fed to a cache of its own",
        )  # fmt: skip
    columns, start = cache.segments[0].columns, 0 if contexts is None else contexts.start
    if tokens.shape != (columns,) or prefix.shape != (start,):
        raise InputError(
            "not the tokens of this cache", got=[list(tokens.shape), list(prefix.shape)],
            expected=f"[{columns}] of the document, [{start}] of its prefix",
        )  # fmt: skip


def _facts(model: Model, cache: SegmentCache, tokens: torch.Tensor, prefix: torch.Tensor, document: str) -> Facts:
    g = model.geometry
    raw = 2 * g.layers * g.kv_heads * g.head_dim * len(tokens) * 2
    origin = cache.segments[0].parts[0].origin
    own, before = files.digest(tokens.cpu()), files.digest(prefix.cpu()) if len(prefix) else ""
    held = sum(buffer.nbytes for layer in cache.segments for lane in layer.lanes() for buffer in lane.buffers())
    identity = files.digest(str(model.fingerprint["weights"]), before, own)
    return Facts(document, len(tokens), own, origin, raw, held, before, identity)


def _check(header: dict[str, Any], model: Model) -> None:
    for key, mine in header["model"].items():
        if model.fingerprint.get(key) != mine:
            raise InputError(
                "the snapshot was made of another model", got=f"{key} = {model.fingerprint.get(key)}",
                expected=f"{key} = {mine}", remedy="save the document again with this model",
            )  # fmt: skip
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != header["dtype"]:
        raise InputError("the snapshot is of another dtype", got=dtype, expected=header["dtype"],
                         remedy=f"load the model with --dtype {header['dtype']}")  # fmt: skip


def _state(layer: SegmentLayer, seen: set[int]) -> Document:
    (part,) = layer.parts
    return {
        "columns": layer.columns, "scale": layer.scale, "softcap": layer.softcap, "fed": part.fed,
        "origin": part.origin, "lanes": tuple(dump(lane, seen) for lane in part.lanes),
    }  # fmt: skip


def _fill(layer: SegmentLayer, state: Document) -> None:
    part = Part([0], 0, layer.make(len(layer.parts)))
    part.fed, part.origin = state["fed"], state["origin"]
    for lane, document in zip(part.lanes, state["lanes"], strict=True):
        fill(lane, document)
    layer.parts = [part]
    layer.columns, layer.scale, layer.softcap = state["columns"], state["scale"], state["softcap"]


def _placed(value: Any, device: torch.device) -> Any:
    """A document whose tensors are on the model's device, codes unpacked for it; records stay as a plan has them."""
    if isinstance(value, Codes):
        return expanded(value).to(device)
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _placed(item, device) for key, item in value.items()}
    return tuple(_placed(item, device) for item in value) if isinstance(value, tuple) else value
