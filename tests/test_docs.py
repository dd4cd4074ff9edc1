"""The documentation is whole: every entry has its section, every option its row, every link its target."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from kvtool import files, options, registry
from kvtool.cli import app
from kvtool.corpus import registry as corpora
from kvtool.model import Geometry
from kvtool.plan import Plan
from kvtool.slots import Keep
from kvtool.statistics._base import Statistic
from kvtool.trace import statistic
from kvtool_kernels import ops
from tests import models
from tests.analyze.traces import blank

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("calibrations/*.md")])
ENTRIES = {
    "methods": registry.names("methods"),
    "statistics": registry.names("statistics"),
    "findings": registry.names("analyze"),
    "corpora": corpora.names(),
    "replay": registry.names("replay/tasks"),
    "cli": list(typer.main.get_command(app).commands),  # type: ignore[attr-defined]
}
NAMED = re.compile(r"`([^`]+)`")


def page(name: str) -> str:
    """A page, or all pages of a folder that has one for each entry, whose titles then count as headings of sections."""
    folder = ROOT / "docs" / name
    if folder.is_dir():
        return "\n".join(path.read_text().replace("# ", "## ", 1) for path in sorted(folder.glob("*.md")))
    return folder.with_suffix(".md").read_text()


@functools.cache
def sections(name: str) -> dict[str, str]:
    """Sections of a page whose heading is a name in code → their text."""
    parts = re.split(r"^## ", page(name), flags=re.MULTILINE)[1:]
    return {found[1]: part for part in parts if (found := re.match(r"`([^`]+)`\n", part))}


def table(text: str, first: str) -> list[list[str]]:
    """Rows of the tables whose first column is headed `first`."""
    rows, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == first)
        if inside and cells[0] != first and set(cells[0]) - set("- "):
            rows.append(cells)
    return rows


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ENTRIES)
def test_each_entry_has_its_section_and_no_section_is_left_over(name: str) -> None:
    assert sorted(sections(name)) == sorted(ENTRIES[name])


def test_derived_pages_are_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs/generate.py"))["pages"]()
    assert {path.stem for path in made} == {"cli", "replay", "corpora", "systems", *ENTRIES["methods"]}
    stale = [path.name for path, text in made.items() if path.read_text() != text]
    assert not stale, "run python docs/generate.py"


BOARD = """
|  | bytes | passkey | two-hop | perplexity × | KL |
| --- | --- | --- | --- | --- | --- |
| `quest@0.5` | 1.1 | 1.00/0.80 | 0.20/– | 1.01 | 0.1 |
| `quest@0.25` | 1.2 | 0.80/0.60 | 0.00/– | 1.07 | 0.2 |
| `span-rule` | 1.0 | 1.00/1.00 | 0.40/– |  |  |
| `duo@0.25` | no gates |  |  |  |  |

## What it takes

| method | options | bits held |
| --- | --- | --- |
| `kivi` | bits=2 | 3.00 |
| `quest` | defaults | 32.00 |

| not a board | passkey |
| --- | --- |
| `razor` | 1.00 |
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quest", "1.2: passkey 0.80/0.60, two-hop 0.00/–, perplexity × 1.07"),
        ("span-rule", "1.0: passkey 1.00/1.00, two-hop 0.40/–"),
        ("duo", "no gates"),
        ("kivi", "[what it takes](scoreboard.md#what-it-takes)"),
        ("razor", "not measured yet"),
    ],
)
def test_systems_get_their_line_of_the_scoreboard_by_its_columns(name: str, said: str) -> None:
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    row = ["a system", "keep", f"`--method {name}`", "a plan", "all", "nothing"]
    made = generate["_scored"](f"| {' | '.join(row)} | of old |", *generate["scoreboard"](BOARD))
    assert made == f"| {' | '.join(row)} | {said} |"


FOLDERS = {"methods": "methods", "replay": "replay/tasks"}


@pytest.mark.parametrize(("where", "name"), [(where, name) for where in FOLDERS for name in ENTRIES[where]])
def test_each_option_has_its_row_and_its_words(where: str, name: str) -> None:
    rows = {row[0].strip("`"): row for row in table(sections(where)[name], "option")}
    described = options.describe(registry.module(FOLDERS[where], name, where).Options)
    assert list(rows) == [option for option, _, _ in described]
    assert all(rows[option][2] for option in rows)


@pytest.mark.parametrize("name", ENTRIES["corpora"])
def test_each_option_of_a_corpus_has_its_words(name: str) -> None:
    told = set(NAMED.findall(sections("corpora")[name].partition("<!-- end -->")[2].replace("=", "` `")))
    inherited = {"seed", "field", "lengths", "depths", "haystack"}  # explained for all, or by an earlier section
    listed = re.search(r"^Options: (.*)\.$", sections("corpora")[name], re.MULTILINE)
    assert listed is not None
    assert {option.partition("=")[0] for option in NAMED.findall(listed[1])} - inherited <= told


@pytest.mark.parametrize("name", ENTRIES["replay"])
def test_each_metric_is_explained(name: str) -> None:
    known = registry.module("replay/tasks", name, "task").METRICS
    assert {row[0].strip("`") for row in table(sections("replay")[name], "metric")} == set(known)


# no letter equals another or a constant of a statistic
LETTERS = {"L": 103, "H": 34, "K": 17, "D": 3, "C": 51}
GEOMETRY = Geometry(
    architecture="",
    layers=LETTERS["L"],
    query_heads=LETTERS["H"],
    kv_heads=LETTERS["K"],
    head_dim=LETTERS["D"],
    hidden=5,
    vocabulary=7,
    windows=(),
    rope="",
)


@pytest.mark.parametrize("name", ENTRIES["statistics"])
def test_each_array_of_a_statistic_has_its_shape_and_rule(name: str) -> None:
    made = statistic(name)(None, GEOMETRY)
    own = type(made).merge is not Statistic.merge
    told: dict[str, tuple[list[int], str]] = {}
    for names, shape, rule, _ in table(sections("statistics")[name], "array"):
        size = [_dimension(part) for part in shape.strip("[]").split(",")]
        told |= dict.fromkeys(NAMED.findall(names), (size, rule))
    assert told == {array: (list(made[array].shape), "kept" if own else rule) for array, rule in made.rules.items()}


def test_the_statistics_that_are_not_taken_by_default_are_named() -> None:
    """In one list, and each in its section."""
    asked = {name for name in ENTRIES["statistics"] if not statistic(name).default}
    listed = re.search(r"A plain `profile` takes all but (.*?)\. ", page("statistics"), re.DOTALL)
    assert listed is not None
    assert set(NAMED.findall(listed[1])) == asked
    said = {
        name
        for name, text in sections("statistics").items()
        if "not taken by default" in " ".join(text.lower().split())
    }
    assert said == asked


def _dimension(text: str) -> int:
    """ "L+1", "C" or "64" → a number."""
    letter, change = re.fullmatch(r"([A-Z]?)([+−]?\d*)", text).groups()  # type: ignore[union-attr]
    return LETTERS.get(letter, 0) + int(change.replace("−", "-") or 0)


@pytest.mark.parametrize("name", ENTRIES["findings"])
def test_each_finding_tells_what_it_reads(name: str) -> None:
    (row,) = [row for row in table(page("findings"), "finding") if NAMED.findall(row[0]) == [name]]
    assert NAMED.findall(row[2]) == list(registry.module("analyze", name, "finding").STATISTICS)


def test_the_headers_of_files_are_explained(tmp_path: Path) -> None:
    trace = blank("residual")
    nothing = torch.zeros(trace.geometry.layers, trace.geometry.kv_heads, dtype=torch.bool)
    plan = Plan("made by hand", trace.model, keep=Keep.heads(nothing, sink=1, recent=1))
    told = set(NAMED.findall(prose(ROOT / "docs/formats.md")))
    header, _ = files.read(trace.write(str(tmp_path / "trace")))
    assert {*header, *header["model"]} <= told
    header, tensors = files.read(plan.write(str(tmp_path / "plan")))
    assert {*header, *header["slots"], *header["slots"]["keep"], *tensors} <= told


def test_the_models_of_the_tests_are_listed() -> None:
    told = {name for row in table(page("models"), "model in the tests") for name in NAMED.findall(row[0])}
    assert told == set(models.EVERY | models.STRETCHED)


def test_the_operations_are_listed() -> None:
    assert {row[0].strip("`") for row in table(page("development"), "op")} == set(ops.__all__)


def test_each_method_stands_among_the_systems() -> None:
    """In one row, whose link is its page and whose command names it; what is not built has no file."""
    rows = table(page("systems"), "system")
    linked = [found for row in rows for found in re.findall(r"\(methods/([\w-]+)\.md\)", row[0])]
    named = [found for row in rows for found in re.findall(r"--method ([\w-]+)", row[2])]
    others = [found[1] for row in table(page("systems"), "method") if (found := re.match(r"\[`([\w-]+)`\]", row[0]))]
    assert linked == named
    assert sorted([*named, *others]) == sorted(ENTRIES["methods"])
    assert all(row[3:5] == ["–", "–"] and not row[6] for row in rows if row[2] == "not built")
    assert {slot for row in rows for slot in row[1].split(", ")} == {"keep", "store", "read", "draft", "–"}


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    named = re.findall(r"`((?:kvtool|kernels|tests|docs|benchmarks|calibrations)/[\w./-]*)`", prose(path))
    assert not dead + [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_can_be_typed(path: Path) -> None:
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in "\n".join(blocks(path, "sh")).replace("\\\n", " ").splitlines():
        for call in re.findall(r"(?<![\w./-])kvtool (\w+)((?:(?!kvtool )[^|)#])*)", line):
            assert call[0] in commands, line
            known = {spelling for parameter in commands[call[0]].params for spelling in parameter.opts}
            assert set(re.findall(r"(?<=\s)--?[a-z][\w-]*", call[1])) <= known | {"-o"}, line
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(path, "sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for code in blocks(path, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvtool"):
                found = importlib.import_module(str(node.module))
                assert all(hasattr(found, alias.name) or _module(found, alias.name) for alias in node.names)


def _module(package: Any, name: str) -> bool:
    return importlib.util.find_spec(f"{package.__name__}.{name}") is not None
