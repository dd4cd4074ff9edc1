"""`kvtool profile`: a model and corpora → a trace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kvtool import files, trace
from kvtool.calibrate import method
from kvtool.commands import _corpora
from kvtool.commands._console import note, progress, size, slug, table
from kvtool.corpus.base import Corpus
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.profile import default_statistics, profile
from kvtool.raw import Raw, span
from kvtool.statistics._weights import check
from kvtool.trace import Trace, statistic


def run(
    name: str, output: str | None, text: dict[str, Any], stats: list[str], methods: list[str], settings: list[str],
    raw: dict[str, Any], resume: bool, seed: int, device: str, dtype: str, force: bool, weight: str = "uniform",
) -> dict[str, Any]:  # fmt: skip
    """Returns the record that `--json` prints."""
    output = output or f"{slug(name)}.trace.safetensors"
    names, chosen, kinds = wanted(stats, methods), _corpora.read(settings), _raw_kinds(raw)
    check(weight)
    if resume and output == "-":
        raise InputError("--resume needs a file", got="-o -")
    continued = resume and Path(output).exists()
    files.check_output(output, force=force or continued)
    folder = _raw_folder(output, force or continued) if kinds else None
    model = load(name, dtype=dtype, device=device)
    observed = _start(model, name, names, output if continued else None, weight)
    corpora = _corpora.build(model, {stat.corpus for stat in observed.statistics.values()}, text, chosen, seed)
    writer = _raw(folder, kinds, raw, model, corpora) if folder else None
    if writer and not continued:
        writer.clear()
    start = time.perf_counter()
    costs = take(model, observed, corpora, output, writer)
    seconds = time.perf_counter() - start
    observed.write(output, force=True)
    total = sum(costs.values())
    table(
        f"profile of {name}: {seconds:.1f} s, of which {total:.1f} s in statistics",
        ("statistic", "seconds", "share of the run"),
        [(stat, f"{cost:.2f}", f"{cost / seconds:.0%}") for stat, cost in sorted(costs.items(), key=lambda i: -i[1])],
    )
    return {
        "output": output, "kind": "trace", "statistics": sorted(observed.statistics), "seconds": seconds,
        "costs": costs,
        "samples": {kind: len(done) for kind, done in observed.done.items()},
    }  # fmt: skip


def wanted(stats: list[str], methods: list[str]) -> list[str]:
    """Names of the statistics to take: those named, those that the methods need, or the usual ones."""
    names = {name.replace("_", "-") for name in stats}
    for name in names:
        statistic(name)  # an unknown one is told before any work
    for name in (part for given in methods for part in given.split(",")):
        names |= set(method(name).STATISTICS)
    if methods and not names:
        raise InputError(f"{', '.join(methods)} needs no statistics", remedy="calibrate on the model itself")
    return sorted(names) or default_statistics()


def take(
    model: Model, observed: Trace, corpora: dict[str, Corpus], output: str, raw: Raw | None = None
) -> dict[str, float]:
    """Run the profile with a progress bar; an interrupt writes what is complete to `output`."""
    total = sum(len(corpus.samples) for corpus in corpora.values())
    try:
        with progress("profile", total) as advance:
            return profile(
                model, observed, corpora, raw=raw, progress=lambda kind, s: advance(f"{kind}, {len(s.tokens)} tokens")
            )
    except KeyboardInterrupt:
        if output != "-":
            observed.complete = False
            observed.write(output, force=True)
            note(f"interrupted: {sum(map(len, observed.done.values()))} samples are in {output}; --resume continues")
        raise


def _start(model: Model, name: str, names: list[str], resumed: str | None, weight: str) -> Trace:
    if resumed is not None:
        observed = trace.read(resumed)
        if observed.model != model.fingerprint:
            raise InputError("cannot resume: the trace is of another model", got=observed.source)
        if sorted(observed.statistics) != names:
            raise InputError(
                "cannot resume with other statistics",
                got=", ".join(names),
                expected=", ".join(sorted(observed.statistics)),
            )
        if observed.weight != weight:
            raise InputError("cannot resume with another weight of tokens", got=weight, expected=observed.weight)
        observed.complete = True
        return observed
    fresh = {stat: statistic(stat)(model, model.geometry) for stat in names}
    return Trace(model.fingerprint, name, fresh, weight=weight)


def _raw_kinds(raw: dict[str, Any]) -> tuple[str, ...]:
    if raw["kinds"] is None:
        for option, value in (("--layers", raw["layers"]), ("--heads", raw["heads"]), ("--raw-tokens", raw["tokens"])):
            if value is not None:
                raise InputError(f"{option} without --raw", got=value, remedy="say what to write, like --raw k,v")
        return ()
    if raw["tokens"] is not None and raw["tokens"] < 1:
        raise InputError("bad --raw-tokens", got=raw["tokens"], expected="1 or more")
    return tuple(kind.strip() for kind in raw["kinds"].split(","))


def _raw_folder(output: str, force: bool) -> Path:
    if output == "-":
        raise InputError("--raw needs a file name", got="-o -")
    folder = Path(output).with_suffix(".raw")
    if folder.exists() and not force:
        raise InputError(f"{folder} exists already", remedy="choose another -o, or pass --force to overwrite it")
    return folder


def _raw(folder: Path, kinds: tuple[str, ...], raw: dict[str, Any], model: Model, corpora: dict[str, Corpus]) -> Raw:
    if "text" not in corpora:
        raise InputError(
            "--raw writes text samples",
            got=", ".join(corpora),
            remedy="add a statistic over text, like --stat channels",
        )
    layers = span(raw["layers"], model.geometry.layers, "--layers")
    heads = span(raw["heads"], model.geometry.query_heads, "--heads")
    samples = corpora["text"].samples
    numbers = {id(sample): number for number, sample in enumerate(samples)}  # the same after a resume
    writer = Raw(folder, kinds, model.geometry, layers, heads, raw["tokens"], numbers)
    needed = writer.check([len(sample.tokens) for sample in samples], model.dtype.itemsize)
    note(f"raw tensors: {size(needed)} into {writer.folder}")
    return writer
