"""Documents read one after the other against documents read apart, kept on disk and put together: whether the right one
is found, what the answer costs, time to the first token, and bytes on disk.

    python benchmarks/documents.py [--documents 4] [--tokens 512] [--samples 8]

Shelves come from the half of the default text that nothing is calibrated on; T and S of APE from the other half.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _harness import table

from kvtool import snapshot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.documents import after, beside, read
from kvtool.calibrate import calibrate
from kvtool.corpus.shelves import Kind, Shelf, shelves
from kvtool.measuring.apart import Apart, divergence, loss, planned
from kvtool.model import Model, load
from kvtool.plan import Plan
from kvtool.slots import Documents

KINDS: tuple[Kind, ...] = ("passkey", "needle")


def first_token(model: Model, cache: SegmentCache, question: torch.Tensor) -> None:
    """One pass over the question."""
    place = cache.segments[0].place
    positions = torch.arange(place, place + len(question))[None]
    with model.served(), torch.no_grad():
        model.network(input_ids=question[None], position_ids=positions, past_key_values=cache, logits_to_keep=1)


def seconds(work: Callable[[], None], repeats: int = 3) -> float:
    """The least of a few."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def kept(model: Model, shelf: Shelf, plan: Plan | None, folder: Path) -> tuple[list[str], int, int]:
    """Files of the documents, their bytes, and the bytes of the keys and values in 16 bits."""
    prefix, paths, raw = read(model, SegmentCache(model), shelf.prefix), [], 0
    for at, ids in enumerate(shelf.documents):
        cache = read(model, after(model, SegmentCache(model, plan, prompt_length=len(ids)), prefix), ids)
        paths.append(str(folder / f"{at}.kv.safetensors"))
        raw += snapshot.save(paths[-1], model, cache, ids, prefix=shelf.prefix, force=True).raw
    return paths, sum(Path(path).stat().st_size for path in paths), raw


def from_disk(model: Model, shelf: Shelf, paths: list[str], how: Documents) -> None:
    """The first token after documents that lie on disk; their prefix is read anew."""
    files = [snapshot.opened(path, model) for path in paths]
    prefix = files[0].made_prefix(model)
    cache = beside(model, SegmentCache(model, planned(model, how)), prefix, [file.cache for file in files])
    first_token(model, cache, shelf.question)


def prefilled(model: Model, shelf: Shelf) -> None:
    """The first token after reading everything."""
    cache = read(model, SegmentCache(model), torch.cat([shelf.prefix, *shelf.documents]))
    first_token(model, cache, shelf.question)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=8)
    asked = parser.parse_args()
    model = load("smollm2")
    size = dict(documents=asked.documents, tokens=asked.tokens)
    ape = calibrate("ape", size | dict(samples=asked.calibration), model=model)
    bits = calibrate("kivi", dict(bits=4, recent=32), model=model)
    ones = torch.ones(model.geometry.layers)
    assert ape.read is not None
    found = ape.read.documents
    assert found is not None
    name = f"APE, T = {float(found.temperature[0]):.2g}, S = {float(found.scale[0]):.2g}"
    ways: list[tuple[str, Plan | None, Documents]] = [
        ("parallel, T = S = 1", None, Documents(ones, ones)),
        ("contiguous, T = S = 1", None, Documents(ones, ones, "contiguous")),
        (name, None, found),
        (f"{name}, 4 bits", bits, found),
    ]
    made = {kind: shelves(model, samples=asked.samples, kind=kind, **size) for kind in KINDS}  # type: ignore[arg-type]
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for kind in KINDS:
        for shelf in made[kind]:
            raw, coded = Apart(model, shelf), Apart(model, shelf, bits)
            full = raw.sequential()
            outcomes = [("sequential", full)]
            outcomes += [(way, (raw if plan is None else coded).together(how)) for way, plan, how in ways]
            for way, p in outcomes:
                hit = float(torch.equal(p.argmax(-1), shelf.answer))
                scores.setdefault(f"{way}/{kind}", []).append((hit, loss(p, shelf.answer), divergence(full, p)))
    shelf = made["passkey"][0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way, plan, how in [("sequential", None, None), *ways]:
            cells = [torch.tensor(scores[f"{way}/{kind}"]).mean(0).tolist() for kind in KINDS]
            if how is None:
                disk, wait = "–", seconds(partial(prefilled, model, shelf))
            else:
                paths, held, raw_bytes = kept(model, shelf, plan, Path(folder))
                disk = f"{held / 1e6:.1f} MB, {held / raw_bytes:.2f}×"
                wait = seconds(partial(from_disk, model, shelf, paths, how))
            rows.append((way, *(f"{cell[0]:.2f} / {cell[1]:.3f} / {cell[2]:.3f}" for cell in cells), disk, wait))
    title = f"{asked.documents} documents of {asked.tokens} tokens, {asked.samples} questions of each kind"
    scored = [f"{kind}: recall / loss / KL" for kind in KINDS]
    table(title, ("documents", *scored, "on disk, of 16 bits", "first token, s"), rows)


if __name__ == "__main__":
    main()
