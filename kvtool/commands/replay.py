"""`kvtool replay`: a model and a plan → a verdict against the full cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kvtool import files, options, plan
from kvtool.commands import _corpora
from kvtool.commands._console import note, progress, size, table
from kvtool.commands._shelf import find
from kvtool.errors import InputError
from kvtool.model import load
from kvtool.replay.subject import Subject
from kvtool.replay.verdict import Verdict, check, judging, replay, task
from kvtool.slots import Draft


def run(
    name: str, plan_path: str, tasks: str, settings: list[str], strict: bool, chunk: int, bounds: list[str],
    output: str | None, seed: int, device: str, dtype: str, force: bool, draft: int | None = None,
    grid: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Returns the record that `--json` prints, and the bounds that are broken. draft: the plan only drafts, so many
    tokens a round. grid: options of all tasks that have them; a task's own setting wins."""
    chosen = _tasks(tasks, settings, grid or {})
    check(bounds, chosen)
    if chunk < 0:
        raise InputError("bad --chunk", got=chunk, expected="0 or more tokens")
    if output is not None:
        files.check_output(output, force=force)
    read = plan.read(find(plan_path))
    if draft is not None:
        read = replace(read, draft=replace(read.draft or Draft(), tokens=draft))
    judged = judging(chosen, read)
    silent = ", ".join(name for name in chosen if name not in judged)
    if silent:
        note(f"note: the full cache verifies what this plan drafts; left out, since they would judge it: {silent}")
        chosen = {name: chosen[name] for name in judged}
    check(bounds, chosen, drafts=read.draft is not None)
    model = load(name, dtype=dtype, device=device)
    read.check(model.fingerprint)
    subject = Subject(model, read, "strict" if strict else "official", chunk, seed)
    with progress("replay", sum(task(key).units(value) for key, value in chosen.items())) as advance:
        verdict = replay(subject, chosen, advance)
    show(verdict)
    return verdict.record(), verdict.broken(bounds)


def write(path: str, document: str) -> None:
    """Write the verdict's JSON document."""
    files.replace(Path(path), document.encode())


def _tasks(tasks: str, settings: list[str], grid: Mapping[str, str]) -> dict[str, Any]:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("no tasks", expected="some of passkey,text,generation,speed")
    scoped = _corpora.scoped(settings)
    for scope in scoped:
        if scope not in names:
            raise InputError("a setting for a task that does not run", got=scope, expected="one of " + ", ".join(names))
    known = {name: {field.name for field in fields(task(name).Options)} for name in names}
    for option in grid:
        if not any(option in known[name] for name in names):
            raise InputError(f"--{option} for tasks that have none", got=", ".join(names), remedy="leave it out")
    shared = {name: {option: value for option, value in grid.items() if option in known[name]} for name in names}
    return {name: options.build(task(name).Options, shared[name] | scoped.get(name, {}), name) for name in names}


def show(verdict: Verdict) -> None:
    """The verdict for people: one table, the passkey grid, the texts side by side."""
    facts, m = verdict.facts, verdict.metrics
    title = f"{facts['plan']['method']} on {facts['model']} · {facts['protocol']} prefill · "
    title += f"{facts['dtype']} on {facts['device']}"
    if facts["drafts"] is not None:
        title += f" · drafts {facts['drafts']} tokens a round; the full cache verifies: "
        lossy = f"LOSSY, since its logits are moved towards the draft by eta = {facts['nudged']}"
        title += "the output is its own" if facts["nudged"] is None else lossy
    rows = [
        (label, form(m[full]) if full in m else "–", form(m[mine]), form_ratio(m, mine, full, ratio))
        for label, mine, full, ratio, form in _ROWS
        if mine in m
    ]
    for name, result in verdict.results.items():
        shower = getattr(task(name), "show", None)
        if shower is not None:
            columns, lines = shower(result)
            table(name, columns, lines)
    table(f"verdict: {title}", ("", "full cache", "this plan", "ratio"), rows)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


_ROWS = (
    ("passkey recall", "recall", "recall_full", None, _number),
    ("perplexity, held-out text", "perplexity", "perplexity_full", "perplexity_ratio", _number),
    ("KL from full, nats", "kl", "", None, _number),
    ("top-1 agreement", "agreement", "", None, _number),
    ("same tokens before parting", "same_tokens", "", None, _number),
    ("drafted tokens accepted", "acceptance", "", None, _number),
    ("tokens per pass over the full cache", "tokens_per_pass", "", None, _number),
    ("bytes held", "bytes_held", "bytes_held_full", "bytes_ratio", size),
    ("bytes read per decode step", "bytes_read", "bytes_read_full", "", size),
    ("bytes moved", "bytes_moved", "", None, size),
    ("prefill", "prefill_seconds", "prefill_seconds_full", "prefill_ratio", _seconds),
    ("decode step", "decode_seconds", "decode_seconds_full", "decode_ratio", _seconds),
)


def form_ratio(metrics: dict[str, float], mine: str, full: str, ratio: str | None) -> str:
    """The ratio column: a metric of its own, or mine over full."""
    if ratio is None:
        return ""
    return f"{metrics[ratio] if ratio else metrics[mine] / metrics[full]:.3f}×"
