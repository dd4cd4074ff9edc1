"""Verdicts: replay, compare, cost."""

from __future__ import annotations

from typing import Annotated

import typer

from kvtool import registry
from kvtool.errors import RunError
from kvtool.parsing._shared import AsJson, Device, Dtype, Force, ModelName, Output, Seed, Settings, document

app = typer.Typer()


@app.command(short_help="Judge a plan: quality, bytes and speed against the full cache.", epilog=(
    "\b\nExamples:"
    "\n  kvtool replay smollm2 --plan smollm2.duo.plan.safetensors --lengths 1000 --fail-if 'recall<0.9'"
    "\n  kvtool replay smollm2 --plan duo.plan --tasks text,speed --set text.tokens=128 --json"
    "\n  kvtool replay smollm2 --plan duo.plan --draft 4 --tasks generation --set generation.tokens=1000"
))  # fmt: skip
def replay(
    model: ModelName,
    plan: Annotated[str, typer.Option(help="A plan, - for stdin, or the name of one in calibrations/.")],
    tasks: Annotated[str, typer.Option(
        help=f"What to measure, of {', '.join(registry.names('replay/tasks'))}."
    )] = "passkey,text,generation,speed",
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths, tokens, of tasks that have several.")] = None,
    depths: Annotated[str | None, typer.Option(help="Depths, 0 to 1, of tasks that hide something.")] = None,
    keys: Annotated[int | None, typer.Option(help="Keys per length and depth of the passkey grid.")] = None,
    draft: Annotated[int | None, typer.Option(
        metavar="TOKENS", help="The plan only drafts, so many tokens a round; the full cache verifies."
    )] = None,
    settings: Settings = [],
    strict: Annotated[bool, typer.Option("--strict", help="Windowed heads see only their window in prefill.")] = False,
    chunk: Annotated[int, typer.Option(help="Prefill in chunks of this many tokens (0: at once).")] = 0,
    fail_if: Annotated[list[str], typer.Option(metavar="BOUND", help="Exit 1 if true, like 'recall<0.9'.")] = [],
    output: Output = None,
    seed: Seed = 0, device: Device = "cpu", dtype: Dtype = "float32", force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Generate with the full cache and with the plan's, and judge quality, bytes and speed.

    Tasks have options: --set text.tokens=128 --set speed.length=4096.
    """
    from kvtool.commands import replay as replay_command

    grid = {"lengths": lengths, "depths": depths, "keys": keys}
    record, broken = replay_command.run(
        model, plan, tasks, settings, strict, chunk, fail_if, output, seed, device, dtype, force, draft,
        {name: str(value) for name, value in grid.items() if value is not None},
    )  # fmt: skip
    if output is not None and output != "-":
        replay_command.write(output, document(record, indent=1))
    if as_json or output == "-":
        print(document(record))
    elif output is not None:
        print(output)
    if broken:
        raise RunError("broken bound: " + "; ".join(broken))


@app.command(short_help="Run many methods on the same prompts: one scoreboard.", epilog=(
    "\b\nExamples:"
    "\n  kvtool compare smollm2 --methods snapkv,streaming,kivi --budgets 0.5,0.25,0.1 -o scoreboard"
    "\n  kvtool compare smollm2 --methods all --lengths 1000,4000 -o scoreboard --resume"
    "\n  kvtool compare smollm2 --methods snapkv --plan smollm2.duo-50 --tasks passkey --set snapkv.window=16"
))  # fmt: skip
def compare(
    model: ModelName,
    methods: Annotated[str, typer.Option(help="Methods, like snapkv,kivi; or all. See kvtool methods.")] = "",
    budgets: Annotated[str, typer.Option(help="Shares of the full cache's bytes, 0 to 1.")] = "0.5,0.25,0.1",
    plan: Annotated[list[str], typer.Option(metavar="PLAN", help="A ready plan to compare too; repeatable.")] = [],
    tasks: Annotated[str, typer.Option(help="What to measure.")] = "text,passkey,needle,two-hop",
    lengths: Annotated[str, typer.Option(help="Prompt lengths, tokens.")] = "1000",
    ask: Annotated[str, typer.Option(help="Is the question known at compression, asked after it, or both?")] = (
        "known,after"
    ),
    quality: Annotated[str | None, typer.Option(
        help="Tasks whose mean the figure draws. Default: passkey,needle, as far as they run."
    )] = None,
    settings: Settings = [],
    trace: Annotated[str | None, typer.Option(help="A trace for methods that read one, instead of a new one.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Windowed heads see only their window in prefill.")] = False,
    chunk: Annotated[int, typer.Option(help="Tokens at a time where a method evicts within prefill.")] = 512,
    steps: Annotated[int, typer.Option(help="Decode steps timed per row and length.")] = 8,
    jobs: Annotated[int, typer.Option(help="Processes that take a prompt each and share the threads.")] = 1,
    output: Annotated[str, typer.Option("-o", "--output", help="What the names of the files begin with.")] = (
        "scoreboard"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from, or add to, what was written there.")] = False,
    seed: Seed = 0, device: Device = "cpu", dtype: Dtype = "float32", force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run many methods at several budgets on the same prompts, and write one scoreboard.

    Writes scoreboard.json, .csv and .png (quality against bytes held, with the Pareto front); a journal, .jsonl, from
    which --resume goes on or to which it adds; and the plans, in scoreboard.plans. A row that fails has its error, and
    the exit code is 1. Methods and tasks have options: --set snapkv.window=16 --set passkey.keys=4.
    """
    from kvtool.commands import compare as compare_command

    request = compare_command.Request(
        model, output, methods, budgets, tasks, lengths, ask, quality, settings, plan, trace, strict, chunk, steps,
        jobs, resume, seed, device, dtype, force,
    )  # fmt: skip
    record = compare_command.run(request)
    written = compare_command.write(request, record, document(record, indent=1))
    print(document(record) if as_json else "\n".join(written))
    if record["failed"]:
        raise RunError("failed: " + ", ".join(record["failed"]))


@app.command(short_help="Say what serving costs on hardware that need not be here.", epilog=(
    "\b\nExamples:"
    "\n  kvtool cost smollm2 --plan smollm2.duo-50 --hardware h200 --lengths 4000,32000,128000"
    "\n  kvtool cost ./model --plan kivi.plan --hardware my-gpu.yaml --batch 16 --figure cost.png"
))  # fmt: skip
def cost(
    model: ModelName,
    hardware: Annotated[str, typer.Option(
        help="a100, h100, h200, l40s, mi300x, rtx-4090, or a YAML or JSON file with the fields of docs/cost.md."
    )],
    plan: Annotated[str | None, typer.Option(
        help="A plan, - for stdin, or the name of one in calibrations/. Default: the full cache alone."
    )] = None,
    lengths: Annotated[str, typer.Option(help="Context lengths, tokens.")] = "1000,4000,16000,64000,128000",
    batch: Annotated[int, typer.Option(help="Sequences that decode together in a step.")] = 1,
    generate: Annotated[int, typer.Option(help="Tokens generated after each prompt, for tokens/s.")] = 250,
    share: Annotated[float, typer.Option(help="Share of the memory that weights and caches may fill.")] = 0.9,
    figure: Annotated[str | None, typer.Option(metavar="PATH", help="Draw the costs over context length.")] = None,
    seed: Seed = 0, device: Device = "cpu", dtype: Dtype = "bfloat16", force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Say what serving costs on hardware that need not be here: users, prefill, decode step, context switch.

    Times follow from the hardware's peaks and from the bytes that a cache of the plan really holds and reads. --device
    is where that cache is filled, with random entries; --dtype what the model is served in.
    """
    from kvtool.commands import cost as cost_command

    request = cost_command.Request(
        model, plan, hardware, lengths, batch, generate, share, figure, seed, device, dtype, force
    )
    record = cost_command.run(request)
    if as_json:
        print(document(record))
    elif figure is not None:
        print(figure)
