"""Traces: profile, merge, analyze."""

from __future__ import annotations

from typing import Annotated

import typer

from kvtool import registry
from kvtool.parsing._shared import (
    AsJson,
    Device,
    Dtype,
    Force,
    ModelName,
    Output,
    Seed,
    Settings,
    document,
    emit,
    one_document,
)

app = typer.Typer()


@app.command(epilog=(
    "\b\nExamples:"
    "\n  kvtool profile smollm2 --for razor"
    "\n  kvtool profile ./model --text book.txt --samples 8 -o book.trace.safetensors"
    "\n  kvtool profile smollm2 --raw k,attention --layers 0-2 --raw-tokens 256"
))  # fmt: skip
def profile(
    model: ModelName,
    output: Output = None,
    text: Annotated[list[str], typer.Option(
        metavar="SOURCE", help="Text files, folders, .jsonl, - (stdin), or default; repeatable."
    )] = ["default"],
    field: Annotated[str, typer.Option(help="Field of .jsonl lines that holds the text.")] = "text",
    tokens: Annotated[int, typer.Option(help="Tokens per text sample.")] = 2048,
    samples: Annotated[int, typer.Option(help="Number of text samples.")] = 4,
    cut: Annotated[str, typer.Option(help="pack documents end to end, or cut at documents.")] = "pack",
    stat: Annotated[list[str], typer.Option(
        metavar="STATISTIC", help="A statistic to take; repeatable. Default: all usual ones. See methods --statistics."
    )] = [],
    for_: Annotated[list[str], typer.Option("--for", metavar="METHOD", help="Take what these methods need.")] = [],
    weight: Annotated[str, typer.Option(help="How much a token counts: uniform, attention, rsq.")] = "uniform",
    settings: Settings = [],
    raw: Annotated[str | None, typer.Option(help="Also write raw tensors: any of k,v,q,attention.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers of --raw, like 0,3-5.")] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads of --raw, like 0,3-5.")] = None,
    raw_tokens: Annotated[int | None, typer.Option(help="First tokens of each sample for --raw.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted profile of the same name.")] = False,
    seed: Seed = 0, device: Device = "cpu", dtype: Dtype = "float32", force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Stream statistics of keys, values and attention into a trace.

    Probes have options of their own: --set needle.lengths=1000,2000 --set repeat.period=512 (see kvtool methods
    --probes).
    """
    from kvtool.commands import profile as profile_command

    one_document(output, as_json)
    options = {"sources": text, "field": field, "tokens": tokens, "samples": samples, "cut": cut}
    raw_options = {"kinds": raw, "layers": layers, "heads": heads, "tokens": raw_tokens}
    record = profile_command.run(
        model, output, options, stat, for_, settings, raw_options, resume, seed, device, dtype, force, weight
    )
    emit(record, as_json)


@app.command(short_help="Add traces of other samples up.", epilog=(
    "\b\nExample: kvtool merge a.trace.safetensors b.trace.safetensors -o both.trace.safetensors"
))  # fmt: skip
def merge(
    traces: Annotated[list[str], typer.Argument(metavar="TRACE...", help="Traces of one model.")],
    output: Annotated[str, typer.Option("-o", "--output", help="File to write; - for stdout.")],
    force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Add traces up: the trace of A and B is the merge of the traces of A and of B."""
    from kvtool.commands import merge as merge_command

    one_document(output, as_json)
    emit(merge_command.run(traces, output, force), as_json)


@app.command(short_help="Say what a trace shows: tables, figures, JSON.", epilog=(
    "\b\nExample: kvtool analyze smollm2.trace.safetensors heads sinks --figures figures"
))  # fmt: skip
def analyze(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A trace; - for stdin.")],
    findings: Annotated[list[str] | None, typer.Argument(
        metavar="FINDINGS...", help=f"Some of {', '.join(registry.names('analyze'))}. Default: all that the trace has."
    )] = None,
    figures: Annotated[str | None, typer.Option(metavar="DIR", help="Draw the figures into this folder.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Say what a trace shows: tables here, figures with --figures, everything with --json."""
    from kvtool.commands import analyze as analyze_command

    record = analyze_command.run(trace, findings or [], figures, force)
    if as_json:
        print(document(record))
    elif figures:
        print(*record["figures"], sep="\n")
