"""What there is: inspect, methods."""

from __future__ import annotations

from typing import Annotated

import typer

from kvtool.errors import InputError
from kvtool.parsing._shared import AsJson, document

app = typer.Typer()


@app.command(
    short_help="Explain a trace, a plan or a snapshot.",
    epilog="\b\nExample: kvtool inspect smollm2.trace.safetensors --json | jq .corpora",
)
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A trace, a plan or a snapshot; - for stdin.")],
    as_json: AsJson = False,
) -> None:
    """Explain a file of kvtool's: what it is, from which model and corpus, shapes and sizes, a plan's scores."""
    from kvtool.commands import inspect as inspect_command

    record = inspect_command.run(file)
    if as_json:
        print(document(record))


@app.command(epilog="\b\nExample: kvtool methods duo")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A method to explain.")] = None,
    probes: Annotated[bool, typer.Option("--probes", help="List corpora and their options instead.")] = False,
    statistics: Annotated[bool, typer.Option("--statistics", help="List statistics instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods, or explain one."""
    from kvtool.commands import methods as methods_command

    asked = [word for word, told in ((name, name), ("--probes", probes), ("--statistics", statistics)) if told]
    if len(asked) > 1:
        raise InputError("one thing at a time", got=" ".join(map(str, asked)), expected="one of them")
    record = methods_command.run(name, "corpus" if probes else "statistics" if statistics else "methods")
    if as_json:
        print(document(record))
