"""Plans: calibrate, compose."""

from __future__ import annotations

from typing import Annotated

import typer

from kvtool.parsing._shared import AsJson, Device, Dtype, Force, Output, Seed, Settings, emit, one_document

app = typer.Typer()


@app.command(epilog=(
    "\b\nExamples:"
    "\n  kvtool calibrate smollm2.trace.safetensors --method razor --set recent=512"
    "\n  kvtool calibrate smollm2 --method duo --steps 40 --lengths 384"
))  # fmt: skip
def calibrate(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A trace (- for stdin), or a model, profiled first.")],
    method: Annotated[str, typer.Option(help="A method; see kvtool methods.")],
    output: Output = None,
    settings: Settings = [],
    steps: Annotated[int | None, typer.Option(help="Training steps, for methods that train.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths in tokens, for methods that train.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted calibration.")] = False,
    seed: Seed = 0, device: Device = "cpu", dtype: Dtype = "float32", force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Turn a trace, or a model, into a plan."""
    from kvtool.commands import calibrate as calibrate_command

    one_document(output, as_json)
    chosen = settings + [f"{k}={v}" for k, v in (("steps", steps), ("lengths", lengths)) if v is not None]
    emit(calibrate_command.run(source, method, output, chosen, resume, seed, device, dtype, force), as_json)


@app.command(epilog=(
    "\b\nExamples:"
    "\n  kvtool compose heads.plan.safetensors bits.plan.safetensors -o both.plan.safetensors"
))  # fmt: skip
def compose(
    plans: Annotated[list[str], typer.Argument(metavar="PLAN...", help="Plans of one model, in different slots.")],
    output: Annotated[str, typer.Option("-o", "--output", help="File to write; - for stdout.")],
    force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Join plans that fill different slots into one."""
    from kvtool.commands import compose as compose_command

    one_document(output, as_json)
    emit(compose_command.run(plans, output, force), as_json)
