"""The command line: parsing and printing, nothing else.

Tables, progress and warnings go to stderr. Stdout carries only data: the path of what was written, or one JSON
record with `--json`. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from typing import Annotated, Any

import typer

from kvtool import __version__
from kvtool.config import Options, expand
from kvtool.errors import InputError, RunError

UsageError = typer.BadParameter.__mro__[1]  # has no public name: newer versions of typer carry their own click

app = typer.Typer(
    name="kvtool", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="What does a model do with its KV cache, how should that cache be compressed, and does it still work then?\n\n"
    "profile -> analyze -> calibrate -> replay. Each writes one file; the next reads it; - is stdin or stdout.\n\n"
    "\b\n"
    "kvtool replay smollm2 --plan $(kvtool calibrate --method razor $(kvtool profile smollm2 --for razor))",
)  # fmt: skip

Output = Annotated[str | None, typer.Option("-o", "--output", help="File to write; - for stdout.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON record on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="An option; may be repeated.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file, or smollm2 (demo model).")]


@app.command(epilog=(
    "\b\nExamples:"
    "\n  kvtool profile smollm2 --for razor"
    "\n  kvtool profile ./model --text book.txt --samples 8 -o book.trace.safetensors"
    "\n  kvtool profile smollm2 --raw k,attention --layers 0-2 --raw-tokens 256"
))  # fmt: skip
def profile(
    model: ModelName,
    output: Output = None,
    text: Annotated[list[str], typer.Option(help="Text files, folders, .jsonl, - (stdin), or default.")] = ["default"],
    field: Annotated[str, typer.Option(help="Field of .jsonl lines that holds the text.")] = "text",
    tokens: Annotated[int, typer.Option(help="Tokens per text sample.")] = 2048,
    samples: Annotated[int, typer.Option(help="Number of text samples.")] = 4,
    cut: Annotated[str, typer.Option(help="pack documents end to end, or cut at documents.")] = "pack",
    stat: Annotated[list[str], typer.Option(help="A statistic to take; repeatable. Default: all usual ones.")] = [],
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

    _one_document(output, as_json)
    options = {"sources": text, "field": field, "tokens": tokens, "samples": samples, "cut": cut}
    raw_options = {"kinds": raw, "layers": layers, "heads": heads, "tokens": raw_tokens}
    record = profile_command.run(
        model, output, options, stat, for_, settings, raw_options, resume, seed, device, dtype, force, weight
    )
    _emit(record, as_json)


@app.command(epilog="\b\nExample: kvtool merge a.trace.safetensors b.trace.safetensors -o both.trace.safetensors")
def merge(
    traces: Annotated[list[str], typer.Argument(metavar="TRACE...", help="Traces of one model.")],
    output: Annotated[str, typer.Option("-o", "--output", help="File to write; - for stdout.")],
    force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Add traces up: the trace of A and B is the merge of the traces of A and of B."""
    from kvtool.commands import merge as merge_command

    _one_document(output, as_json)
    _emit(merge_command.run(traces, output, force), as_json)


@app.command(epilog="\b\nExample: kvtool analyze smollm2.trace.safetensors heads sinks --figures figures")
def analyze(
    trace: Annotated[str, typer.Argument(help="A trace; - for stdin.")],
    findings: Annotated[list[str] | None, typer.Argument(help="heads, layers, spectra, channels, sinks.")] = None,
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

    _one_document(output, as_json)
    chosen = settings + [f"{k}={v}" for k, v in (("steps", steps), ("lengths", lengths)) if v is not None]
    _emit(calibrate_command.run(source, method, output, chosen, resume, seed, device, dtype, force), as_json)


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

    _one_document(output, as_json)
    _emit(compose_command.run(plans, output, force), as_json)


@app.command(epilog=(
    "\b\nExamples:"
    "\n  kvtool replay smollm2 --plan smollm2.duo.plan.safetensors --lengths 1000 --fail-if 'recall<0.9'"
    "\n  kvtool replay smollm2 --plan duo.plan --tasks text,speed --set text.tokens=128 --json"
))  # fmt: skip
def replay(
    model: ModelName,
    plan: Annotated[str, typer.Option(help="A plan, - for stdin, or the name of one in calibrations/.")],
    tasks: Annotated[str, typer.Option(help="What to measure.")] = "passkey,text,generation,speed",
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths of the passkey grid, tokens.")] = None,
    depths: Annotated[str | None, typer.Option(help="Depths of the passkey grid, 0 to 1.")] = None,
    keys: Annotated[int | None, typer.Option(help="Keys per point of the grid.")] = None,
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

    grid = (("passkey.lengths", lengths), ("passkey.depths", depths), ("passkey.keys", keys))
    chosen = settings + [f"{key}={value}" for key, value in grid if value is not None]
    record, broken = replay_command.run(
        model, plan, tasks, chosen, strict, chunk, fail_if, output, seed, device, dtype, force
    )
    if output is not None and output != "-":
        replay_command.write(output, document(record, indent=1))
    if as_json or output == "-":
        print(document(record))
    elif output is not None:
        print(output)
    if broken:
        raise RunError("broken bound: " + "; ".join(broken))


@app.command(epilog=(
    "\b\nExamples:"
    "\n  kvtool compare smollm2 --methods snapkv,streaming,kivi --budgets 0.5,0.25,0.1 -o scoreboard"
    "\n  kvtool compare smollm2 --methods all --lengths 1000,4000 -o scoreboard --resume"
    "\n  kvtool compare smollm2 --methods snapkv --plan smollm2.duo-50 --tasks passkey --set snapkv.window=16"
))  # fmt: skip
def compare(
    model: ModelName,
    methods: Annotated[str, typer.Option(help="Methods, like snapkv,kivi; or all. See kvtool methods.")] = "",
    budgets: Annotated[str, typer.Option(help="Shares of the full cache's bytes, 0 to 1.")] = "0.5,0.25,0.1",
    plan: Annotated[list[str], typer.Option(help="A ready plan to compare too; repeatable.")] = [],
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
        resume, seed, device, dtype, force,
    )  # fmt: skip
    record = compare_command.run(request)
    written = compare_command.write(request, record, document(record, indent=1))
    print(document(record) if as_json else "\n".join(written))
    if record["failed"]:
        raise RunError("failed: " + ", ".join(record["failed"]))


@app.command(epilog=(
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


@app.command(epilog=(
    "\b\nExamples:"
    "\n  kvtool save smollm2 report.txt --plan smollm2.cachegen.plan.safetensors"
    "\n  kvtool save smollm2 default --tokens 1500 -o default.kv.safetensors"
))  # fmt: skip
def save(
    model: ModelName,
    document: Annotated[str, typer.Argument(metavar="DOCUMENT", help="A text file, - for stdin, or default.")],
    plan: Annotated[str | None, typer.Option(
        help="A plan, - for stdin, or the name of one in calibrations/. Default: the full cache."
    )] = None,
    output: Output = None,
    tokens: Annotated[int, typer.Option(help="Read only so many tokens of the document (0: all).")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Windowed heads see only their window in prefill.")] = False,
    chunk: Annotated[int, typer.Option(help="Prefill in chunks of this many tokens (0: at once).")] = 0,
    device: Device = "cpu", dtype: Dtype = "float32", force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Read a document and write its cache: a snapshot that another run goes on from.

    The file has what the plan holds, codes entropy-coded, and the plan itself.
    """
    from kvtool.commands import save as save_command

    _one_document(output, as_json)
    _emit(save_command.run(model, document, plan, output, tokens, strict, chunk, device, dtype, force), as_json)


@app.command(epilog=(
    "\b\nExample: kvtool generate smollm2 report.kv.safetensors $'\\nIn short, the report says that'"
))  # fmt: skip
def generate(
    model: ModelName,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="What kvtool save wrote; - for stdin.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text that follows the document; - for stdin.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    device: Device = "cpu", dtype: Dtype = "float32", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Go on from a snapshot: print what the model writes after the document and a prompt, most likely token first."""
    from kvtool.commands import generate as generate_command

    record = generate_command.run(model, snapshot, prompt, tokens, device, dtype)
    print(document(record) if as_json else record["text"])


@app.command(epilog="\b\nExample: kvtool inspect smollm2.trace.safetensors --json | jq .corpora")
def inspect(
    file: Annotated[str, typer.Argument(help="A trace, a plan or a snapshot; - for stdin.")], as_json: AsJson = False
) -> None:
    """Explain any file that kvtool wrote: what, from which model and corpus, shapes and sizes."""
    from kvtool.commands import inspect as inspect_command

    record = inspect_command.run(file)
    if as_json:
        print(document(record))


@app.command(epilog="\b\nExample: kvtool methods duo")
def methods(
    name: Annotated[str | None, typer.Argument(help="A method to explain.")] = None,
    probes: Annotated[bool, typer.Option("--probes", help="List corpora and their options instead.")] = False,
    statistics: Annotated[bool, typer.Option("--statistics", help="List statistics instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods, or explain one."""
    from kvtool.commands import methods as methods_command

    record = methods_command.run(name, "corpus" if probes else "statistics" if statistics else "methods")
    if as_json:
        print(document(record))


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    config: Annotated[str | None, typer.Option(help="YAML file of options; the command line wins.")] = None,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def _emit(record: dict[str, Any], as_json: bool) -> None:
    """Print what was written: its path, or the whole record."""
    if as_json:
        print(document(record))
    elif record["output"] != "-":
        print(record["output"])


def _one_document(output: str | None, as_json: bool) -> None:
    if as_json and output == "-":
        raise InputError(
            "stdout cannot carry the file and its record", got="-o - and --json", remedy="drop one of them"
        )


def document(record: dict[str, Any], indent: int | None = None) -> str:
    """One JSON document. NaN and infinities become null: JSON has no word for them."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), indent=indent)


def _options() -> dict[str, Options]:
    """Command → its options → how often each is given: "switch", "one" or "many"."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {
            spelling: "switch" if option.is_flag else "many" if option.multiple else "one"
            for option in command.params
            for spelling in option.opts
            if spelling.startswith("--") and spelling != "--help"
        }
        for name, command in commands.items()
    }


def main() -> None:
    """Run, and turn every failure into one line and an exit code: 1 the run failed, 2 bad usage or input, 130
    interrupted."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(args=expand(arguments, _options), prog_name="kvtool", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer turns a KeyboardInterrupt into this
            _fail("interrupted", 130)
        sys.exit(code or 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader went away: nothing to tell anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if isinstance(error, UsageError):
            _fail(_usage(error), 2)
        if debug:
            raise
        if isinstance(error, InputError):
            _fail(str(error), 2)
        known = isinstance(error, RunError)
        _fail(str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _usage(error: Any) -> str:
    """What was wrong with the command line, and where to read on."""
    text, near = error.format_message(), getattr(error, "possibilities", None)
    if near:
        name = error.option_name
        text = f"{error.message}. Did you mean {(difflib.get_close_matches(name, near, n=1) or near)[0]}?"
    command = error.ctx.command_path if error.ctx is not None else "kvtool"
    return text[:1].lower() + text[1:] + ("" if text.endswith((".", "?")) else ".") + f" See {command} --help."


def _fail(text: str, code: int) -> None:
    print(f"kvtool: {' '.join(text.splitlines())}", file=sys.stderr)
    sys.exit(code)
