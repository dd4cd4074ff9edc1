"""cost: a table on stderr, one JSON document, and a figure; refusals in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.terminal import files, kv

SHORT = ("--hardware", "h200", "--lengths", "40,300,50000")


def test_the_record_and_the_table(model: Path, plan: Path) -> None:
    ran = kv("cost", model, "--plan", plan, *SHORT, "--json").fine()
    record = ran.document
    assert record["kind"] == "cost"
    assert set(record["costs"]) == {"full", "razor"}
    full, mine = record["costs"].values()
    assert [row["tokens"] for row in full] == [40, 300, 50000]
    assert all(less["held"] <= more["held"] for less, more in zip(mine, full, strict=True))
    entry = 2 * 2 * 2 * 8 * 2  # layers, KV heads, keys and values, channels, bytes
    assert [row["read"] for row in full] == [entry * tokens for tokens in (40, 300, 50000)]
    assert mine[-1]["users"] > full[-1]["users"] > 0
    assert 1 < mine[-1]["faster"] < mine[-1]["most"]
    assert record["break_even"]["full"] * entry == pytest.approx(record["network"]["streamed"])
    assert (record["ledger"]["full"]["deviation"], record["ledger"]["full"]["exact"]) == (0, True)
    for word in ("tokens", "users", "prefill", "step", "switch", "razor", "50000"):
        assert word in ran.err


def test_weights_of_an_untied_table_are_not_streamed(model: Path) -> None:
    network = kv("cost", model, *SHORT, "--json").fine().document["network"]
    assert network["weights"] - network["streamed"] == 257 * 32 * 2  # the input table, in bfloat16
    assert network["multiplied"] == network["streamed"] / 2


def test_a_figure_is_never_overwritten_unasked(model: Path, here: Path) -> None:
    assert kv("cost", model, *SHORT, "--figure", "costs.png").fine().text == "costs.png"
    assert (here / "costs.png").read_bytes().startswith(b"\x89PNG")
    kv("cost", model, *SHORT, "--figure", "costs.png").refused("costs.png", "--force")
    kv("cost", model, *SHORT, "--figure", "costs.png", "--force").fine()
    assert files(here) == {"costs.png"}


def test_without_a_figure_stdout_is_empty(model: Path, here: Path) -> None:
    ran = kv("cost", model, *SHORT).fine()
    assert ran.out == b""
    assert not files(here)


def test_hardware_from_a_file(model: Path, here: Path) -> None:
    (here / "mine.yaml").write_text("{tflops: {bfloat16: 1}, memory: 0.001, bandwidth: 1, link: 1}")
    record = kv("cost", model, "--hardware", "mine.yaml", "--lengths", "50000", "--json").fine().document
    assert record["hardware"]["memory"] == 1e6
    assert record["costs"]["full"][0]["users"] == 0
    assert record["costs"]["full"][0]["session"] is None
    kv("cost", model, "--hardware", "mine.yaml", "--dtype", "float32").refused("float32", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "h20"], ["h20", "'h200'"]),
        (["--hardware", "h200", "--lengths", "long"], ["--lengths", "long"]),
        (["--hardware", "h200", "--lengths", "4"], ["--lengths", "16"]),
        (["--hardware", "h200", "--batch", "0"], ["--batch"]),
        (["--hardware", "h200", "--share", "1.5"], ["--share", "1.5"]),
        (["--hardware", "h200", "--plan", "nowhere"], ["no such plan", "nowhere"]),
        (["--hardware", "h200", "--figure", "costs.nothing"], ["costs.nothing"]),
        ([], ["--hardware"]),
    ],
)
def test_refusals(model: Path, here: Path, arguments: list[str], words: list[str]) -> None:
    kv("cost", model, *arguments).refused(*words)
    assert not files(here)


def test_a_plan_that_drafts(model: Path, here: Path) -> None:
    kv("calibrate", model, "--method", "draft", "-o", "draft.plan").fine()
    kv("cost", model, "--hardware", "h200", "--plan", "draft.plan").refused("drafts")
