"""merge, compose, inspect, methods and analyze: what their files and records say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvtool import registry
from kvtool.commands.inspect import numbers
from kvtool.files import read as read_file
from kvtool.trace import read as read_trace
from tests.cli.terminal import files, kv
from tests.cli.tiny import RAZOR, REPLAY, TEXT


def test_a_merge_is_the_profile_of_both(model: Path, induction: Path, second: Path, here: Path) -> None:
    record = kv("merge", induction, second, "-o", "both.trace", "--json").fine().document
    assert record == {"output": "both.trace", "kind": "trace", "statistics": ["induction"], "parts": 2}
    kv("merge", second, induction, "-o", "other way.trace").fine()
    both, one = (kv("inspect", path, "--json").document for path in ("both.trace", induction))
    assert (len(both["done"]["repeat"]), len(both["corpora"]["repeat"])) == (2, 2)
    assert both["model"] == one["model"]
    assert Path("both.trace").read_bytes() == Path("other way.trace").read_bytes()


def test_a_merge_joins_statistics(model: Path, induction: Path, here: Path) -> None:
    kv("profile", model, "--stat", "gram", "--tokens", "32", "--samples", "1", "-o", "gram.trace").fine()
    record = kv("merge", induction, "gram.trace", "-o", "both.trace", "--json").fine().document
    assert record["statistics"] == ["gram", "induction"]


def test_a_composition_with_a_lossless_plan_replays_alike(model: Path, plan: Path, lossless: Path, here: Path) -> None:
    record = kv("compose", plan, lossless, "-o", "both.plan", "--json").fine().document
    assert record["slots"] == {"keep": True, "store": False, "read": False, "draft": False}
    alone, both = (kv("replay", model, "--plan", p, *TEXT, "--json").fine().document for p in (plan, "both.plan"))
    assert both["metrics"] == alone["metrics"]


def test_inspect_tells_a_plan(plan: Path) -> None:
    ran = kv("inspect", plan, "--json").fine()
    assert ran.document["kind"] == "plan"
    assert ran.document["method"] == "razor"
    assert ran.document["options"]["recent"] == 32
    assert ran.document["tensors"]["keep.recent"] == {"shape": [2, 2], "dtype": "int32", "bytes": 16}
    for word in ("razor", "keep.recent", "evidence.induction", "model.weights", "repeat"):
        assert word in ran.err


def test_inspect_tells_the_range_of_a_plans_small_arrays(plan: Path, trace: Path) -> None:
    scores = read_file(plan)[1]["evidence.induction"]
    ran = kv("inspect", plan, "--json").fine()
    told = ran.document["numbers"]["evidence.induction"]
    assert told["mean"] == pytest.approx(float(scores.double().mean()))
    assert scores[tuple(told["most_at"])] == scores.max() == told["most"]
    assert scores[tuple(told["least_at"])] == scores.min() == told["least"]
    assert "keep.recent" not in ran.document["numbers"]  # counts of entries
    assert f"{told['most']:.3g}" in ran.err
    assert kv("inspect", trace, "--json").fine().document["numbers"] == {}  # sums, of which an extreme says nothing


def test_inspect_leaves_out_what_is_not_finite_and_what_is_large() -> None:
    values = torch.tensor([[3.0, float("inf")], [float("nan"), -1.0]])
    told = numbers({"few": values, "none": values[:, 1:2].log(), "one": values[:1, :1], "large": torch.ones(65, 64)})
    assert told == {"few": {"least": -1.0, "least_at": [1, 1], "mean": 1.0, "most": 3.0, "most_at": [0, 0]}}


def test_inspect_tells_a_trace(trace: Path) -> None:
    ran = kv("inspect", trace, "--json").fine()
    seen = ran.document
    assert seen["complete"]
    assert {kind: len(done) for kind, done in seen["done"].items()} == {"needle": 1, "repeat": 2, "text": 2}
    assert seen["bytes"] == sum(tensor["bytes"] for tensor in seen["tensors"].values())
    assert seen["corpora"]["text"][0]["options"]["half"] == "calibration"
    for word in ("text", "needle", "repeat", "tiny llama", "first 40 of"):
        assert word in " ".join(ran.err.split())  # long paths make the table fold lines


@pytest.mark.parametrize(
    ("flags", "key", "folder"), [([], "methods", "methods"), (["--statistics"], "statistics", "statistics")]
)
def test_lists(flags: list[str], key: str, folder: str) -> None:
    assert list(kv("methods", *flags, "--json").fine().document[key]) == registry.names(folder)


@pytest.mark.parametrize("name", registry.names("methods"))
def test_each_method_explains_its_options(name: str) -> None:
    record = kv("methods", name, "--json").fine().document
    assert record["method"] == name
    assert all(meaning for _, _, meaning in record["options"])


def test_replay_measures_what_its_tasks_say(model: Path, lossless: Path, here: Path) -> None:
    record = kv("replay", model, "--plan", lossless, *REPLAY, "--json").fine().document
    modules = [registry.module("replay/tasks", name, "task") for name in ("passkey", "text", "generation", "speed")]
    drafted = {metric for module in modules for metric in getattr(module, "DRAFTED", ())}  # there is no draft here
    assert set(record["metrics"]) == {metric for module in modules for metric in module.METRICS} - drafted
    assert record["metrics"]["bytes_ratio"] == 1.0
    assert record["protocol"] == "official"


@pytest.mark.parametrize("how", [["--strict"], ["--chunk", "32"], ["--dtype", "bfloat16"], ["--seed", "1"]])
def test_replay_otherwise(how: list[str], model: Path, plan: Path, here: Path) -> None:
    record = kv("replay", model, "--plan", plan, *TEXT, *how, "--json").fine().document
    assert record["protocol"] == ("strict" if "--strict" in how else "official")
    assert record["dtype"] == ("bfloat16" if "--dtype" in how else "float32")
    assert record["metrics"]["kl"] >= 0


def test_replay_of_a_users_own_text(model: Path, plan: Path, here: Path) -> None:
    Path("my text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    record = kv("replay", model, "--plan", plan, *TEXT, "--set", "text.source=my text.txt", "--json").fine().document
    assert record["tasks"]["text"]["corpus"]["sources"] == ["my text.txt"]


def test_an_unused_setting_is_told(model: Path, here: Path) -> None:
    ran = kv("profile", model, *RAZOR, "--set", "needle.samples=1", "-o", "a.trace").fine()
    assert "needle" in ran.err.splitlines()[0]


def test_analyze_draws_where_it_is_told(trace: Path, here: Path) -> None:
    names = kv("analyze", trace, "sinks", "heads", "--figures", "my figures").fine().text.splitlines()
    assert set(names) == files(here)
    assert all(name.startswith("my figures/") for name in names)
    kv("analyze", trace, "heads", "--figures", "my figures", "--force").fine()
    Path("my figures", sorted(Path(name).name for name in names)[-1]).unlink()
    left = files(here)
    kv("analyze", trace, "sinks", "heads", "--figures", "my figures").refused("exists already", "--force")
    assert files(here) == left
    kv("analyze", trace, "heads", "--figures", trace).refused("cannot write figures", trace.name)


def _needed(finding: str) -> tuple[str, ...]:
    needed: tuple[str, ...] = registry.module("analyze", finding, "finding").STATISTICS
    return needed


def test_analyze_takes_what_there_is(trace: Path, induction: Path) -> None:
    there = set(read_trace(str(trace)).statistics)
    fed = [name for name in registry.names("analyze") if there.issuperset(_needed(name))]
    assert len(fed) >= 7
    assert list(kv("analyze", trace, "--json").fine().document["findings"]) == fed
    ran = kv("analyze", induction, "--json").fine()
    assert "heads" in ran.document["findings"]
    assert "--stat gram" in ran.err
    assert (
        kv("analyze", "-", "--json", stdin=induction.read_bytes()).fine().document["findings"]
        == ran.document["findings"]
    )
