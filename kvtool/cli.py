"""The command line: the program itself, its exit codes, and its failures in one line each.

Its commands are in `kvtool/parsing/`: parsing and printing, nothing else. Tables, progress and warnings go to stderr.
Stdout carries only data: the path of what was written, or one JSON record with `--json`. Heavy imports happen inside
the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from typing import Annotated, Any

import typer

from kvtool import __version__
from kvtool.config import Options, expand
from kvtool.errors import InputError, RunError
from kvtool.parsing import listings, plans, snapshots, traces, verdicts

UsageError = typer.BadParameter.__mro__[1]  # has no public name: newer versions of typer carry their own click

app = typer.Typer(
    name="kvtool", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="What does a model do with its KV cache, how should that cache be compressed, and does it still work then?\n\n"
    "profile -> analyze -> calibrate -> replay. Each writes one file; the next reads it; - is stdin or stdout.\n\n"
    "\b\n"
    "kvtool replay smollm2 --plan $(kvtool calibrate --method razor $(kvtool profile smollm2 --for razor))",
)  # fmt: skip
for group in (traces, plans, verdicts, snapshots, listings):
    app.add_typer(group.app)


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
        if sys.stdout is not None:  # it is None when the shell closed it
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
        _fail(_failure(error), 1)


def _failure(error: Exception) -> str:
    """What went wrong in a run whose input was good."""
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:  # a full disk, a device that went away
        return f"cannot go on: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {error} (--debug shows where)"


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
