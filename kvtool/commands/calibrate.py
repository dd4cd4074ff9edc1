"""`kvtool calibrate`: a trace or a model → a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtool import files, options, registry, trace
from kvtool.calibrate import calibrate, method, reads
from kvtool.commands import _corpora
from kvtool.commands._console import note, progress, slug
from kvtool.commands.profile import take
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.trace import Trace, statistic

TEXT = {"sources": ["default"], "tokens": 2048, "samples": 4}  # what a plain profile reads


def run(
    source: str, name: str, output: str | None, settings: list[str], resume: bool, seed: int, device: str, dtype: str,
    force: bool,
) -> dict[str, Any]:  # fmt: skip
    """Returns the record that `--json` prints."""
    module, name = method(name), registry.spelled(name)
    values = options.pairs(settings)
    needed = reads(module, options.build(module.Options, values, name))  # bad options are told before any work
    seen = trace.read(source) if _is_trace(source) else None
    model_name = source if seen is None else seen.source
    output = output or f"{slug(model_name)}.{name}.plan.safetensors"
    files.check_output(output, force=force)
    if seen is not None:
        seen.need(*needed)
        if needed and not seen.complete:
            note(f"note: the profile of {source} was interrupted; profile --resume would complete it")
    model = load(model_name, dtype=dtype, device=device) if seen is None else None
    if needed and model is not None:
        seen = _profiled(model, model_name, needed, seed)
    state = None if output == "-" or files.is_stream(Path(output)) else Path(f"{output}.part")
    if state is not None and not resume:
        state.unlink(missing_ok=True)
    try:
        with progress(f"calibrate {name}", 1) as advance:
            plan = calibrate(
                name, values, model=model, trace=seen, seed=seed, state=state,
                progress=lambda done, total, text: advance(text, done=done, total=total),
                load=lambda: load(model_name, dtype=dtype, device=device),
            )  # fmt: skip
    except KeyboardInterrupt:
        if state is not None and state.exists():
            note(f"interrupted: --resume continues from {state}")
        raise
    plan.write(output, force=force)
    return {
        "output": output,
        "kind": "plan",
        "method": name,
        "options": plan.options,
        "facts": plan.provenance["facts"],
    }


def _is_trace(source: str) -> bool:
    path = Path(source)
    if path.suffix in (".safetensors", ".trace") and not path.exists():
        raise InputError("no such trace", got=source, remedy="make it with kvtool profile")
    return source == "-" or (path.exists() and not path.is_dir() and path.suffix != ".gguf")


def _profiled(model: Model, name: str, statistics: tuple[str, ...], seed: int) -> Trace:
    seen = Trace(model.fingerprint, name, {stat: statistic(stat)(model, model.geometry) for stat in statistics})
    corpora = _corpora.build(model, {stat.corpus for stat in seen.statistics.values()}, TEXT, {}, seed)
    take(model, seen, corpora, "-")
    return seen
