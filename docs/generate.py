"""Writes what the documentation can take from the code: docs/cli.md, and the option tables inside other pages.

    python docs/generate.py

A table stands between `<!-- options: KIND NAME -->` and `<!-- end -->`, where KIND is method, task or corpus.
tests/test_docs.py compares the pages with what this makes, so it is run after any change of an option.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from kvtool import options, registry
from kvtool.cli import app
from kvtool.corpus import registry as corpora

DOCS = Path(__file__).parent
MARKED = re.compile(r"(<!-- options: (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

SYSTEM = 7  # cells of a row of docs/systems.md
BUDGET = "0.25"  # whose line of the scoreboard it shows
RECALLED = ("passkey", "needle", "two-hop")

INTRODUCTION = """\
# Command line

Written by `python docs/generate.py`; a test compares.

`profile`, `merge`, `calibrate`, `compose` and `save` write one file each; `replay` and `analyze` do when asked.
`kvtool inspect FILE` explains any trace, plan or snapshot.

**Output.** Stdout carries data only: the path of what was written, or one JSON record with `--json`. Tables, progress
and warnings go to stderr. `-` as a file is stdin or stdout; when the file itself goes to stdout, no path is printed,
and `--json` is refused. `profile` without `-o` writes `<model>.trace.safetensors` into the current folder, `calibrate`
writes `<model>.<method>.plan.safetensors`, `save` `<document>.kv.safetensors`. An existing file is never overwritten
without `--force`. A file appears under its name only when it is whole.

**Exit codes.** 0: done. 1: the run failed, or a `--fail-if` bound is broken. 2: bad usage or bad input. 130:
interrupted. A failure is one line on stderr; `--debug` shows the traceback.

**Spelling.** Dashes and underscores in option names are the same. `--set key=value` reaches options that a method, a
corpus or a task declares itself, and may be repeated. `-h` explains any command.

**Configuration.** `--config FILE.yaml` maps option names to values, for all commands that have the option or below a
command's name. What stands on the command line wins, settings key by key.

```yaml
seed: 1
profile:
  tokens: 512
  set: {needle: {lengths: [500, 1000]}}
```

**Seeds.** `--seed` seeds everything that is drawn. Equal inputs on the same machine and versions give equal files.
"""


def pages() -> dict[Path, str]:
    """Every page that is derived in whole or in part → what it should say."""
    made = {DOCS / "cli.md": command_line()}
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        if MARKED.search(text):
            made[path] = MARKED.sub(lambda found: found[1] + _marked(found[2], found[3]) + found[4], text)
    made[DOCS / "systems.md"] = systems()
    return made


def systems() -> str:
    """The page of the systems, with the scoreboard's numbers in its last column."""
    board, elsewhere = scoreboard((DOCS / "scoreboard.md").read_text())
    lines = (DOCS / "systems.md").read_text().splitlines()
    return "\n".join(_scored(line, board, elsewhere) for line in lines) + "\n"


def scoreboard(text: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Rows of the board by name, as column → cell; and of methods in other tables the title above the first."""
    board: dict[str, dict[str, str]] = {}
    elsewhere: dict[str, str] = {}
    title, columns = "", None
    for line in text.splitlines():
        if not line.startswith("|"):
            title = line.removeprefix("## ") if line.startswith("## ") else title
            columns = None
        elif columns is None:
            columns = _cells(line)
        else:
            row = dict(zip(columns, _cells(line), strict=True))
            name = row[columns[0]].strip("`")
            if "bytes" in row:
                board.setdefault(name, row)
            elif columns[0] == "method":
                elsewhere.setdefault(name, title)
    return board, elsewhere


def _scored(line: str, board: dict[str, dict[str, str]], elsewhere: dict[str, str]) -> str:
    """A row of a system whose command names a method gets that method's line, if there is one."""
    named, cells = re.search(r"`--method ([\w-]+)", line), _cells(line)
    if len(cells) != SYSTEM or not named:
        return line
    row = board.get(f"{named[1]}@{BUDGET}", board.get(named[1]))
    title = elsewhere.get(named[1], "")
    said = f"[{title.lower()}](scoreboard.md#{title.lower().replace(' ', '-')})" if title else "not measured yet"
    if row is not None:
        parts = [f"{task} {row[task]}" for task in RECALLED if row.get(task)]
        parts += [f"perplexity × {row['perplexity ×']}"] if row["perplexity ×"] else []
        said = f"{row['bytes']}: {', '.join(parts)}" if parts else row["bytes"]
    return f"| {' | '.join([*cells[:-1], said])} |"


def _cells(line: str) -> list[str]:
    """The cells of a table's row; none of another line."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def command_line() -> str:
    """The page of the commands."""
    group: Any = typer.main.get_command(app)
    parts = [INTRODUCTION, "## Options of `kvtool` itself\n", _options(group)]
    for name, command in group.commands.items():
        usage = " ".join(["kvtool", name, *(_usage(p) for p in command.params if _is_argument(p)), "[OPTIONS]"])
        words = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.help).replace("\b\n", ""))
        parts += [f"## `{name}`\n", words + "\n"]
        parts += [_block([usage]), _options(command)]
        examples = re.findall(r"kvtool .+", command.epilog or "")
        if examples:
            parts.append(_block(examples))
    return "\n".join(parts)


def _block(lines: Sequence[str]) -> str:
    return "\n".join(["```sh", *lines, "```"]) + "\n"


def _options(command: Any) -> str:
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    rows = []
    for entry in command.params:
        if _is_argument(entry):
            spelling, value = f"`{_name(entry)}`", ""
        else:
            spelling = ", ".join(f"`{name}`" for name in entry.opts)
            value = _value(entry.metavar, hints[entry.name])
        rows.append((spelling, value, _default(entry), _cell(entry.help)))
    return _table(("option", "value", "default", "meaning"), rows)


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _name(argument: Any) -> str:
    return argument.metavar or argument.name.upper() + ("..." if argument.nargs == -1 else "")


def _usage(argument: Any) -> str:
    return _name(argument) if argument.required else f"[{_name(argument)}]"


def _value(metavar: str | None, hint: Any) -> str:
    kinds = typing.get_args(hint) or (hint,)
    if bool in kinds:
        return ""
    name = metavar or ("whole number" if int in kinds else "text")
    return name + (", repeatable" if typing.get_origin(hint) is list else "")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default is None or option.default is False or option.default == []:
        return ""
    return f"`{','.join(option.default) if isinstance(option.default, list) else option.default}`"


def _marked(kind: str, name: str) -> str:
    if kind == "corpus":
        parameters = list(inspect.signature(corpora.builder(name)).parameters.values())[1:]
        return "Options: " + ", ".join(f"`{p.name}={_plain(p.default)}`" for p in parameters) + ".\n"
    folder = {"method": "methods", "task": "replay/tasks"}[kind]
    rows = options.describe(registry.module(folder, name, kind).Options)
    return _table(("option", "default", "meaning"), [(f"`{o}`", f"`{d}`" if d else "", _cell(h)) for o, d, h in rows])


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = ["| " + " | ".join(cells) + " |" for cells in [columns, *rows]]
    lines.insert(1, "|" + " --- |" * len(columns))
    return "\n".join(re.sub(r" +\|", " |", line) for line in lines) + "\n"


if __name__ == "__main__":
    for page, content in pages().items():
        if not page.exists() or page.read_text() != content:
            page.write_text(content)
            sys.stdout.write(f"{page}\n")
