"""save --prefix and generate of several snapshots: documents read apart, put together in any order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from kvtool.model import load
from tests.cli.terminal import kv

PREFIX = "Documents follow. "
TEXTS = {
    "a": "The first of them is about the sea, and is longer. ",
    "b": "The second is not. ",
    "c": "A third one, too. ",
}
QUESTION = "So what is "


@pytest.fixture(scope="session")
def coded(shelf: Path, model: Path) -> Path:
    path = shelf / "kivi.plan"
    settings = ("--set", "bits=4", "--set", "group=8", "--set", "recent=8")
    kv("calibrate", model, "--method", "kivi", *settings, "-o", path).fine()
    return path


@pytest.fixture(scope="session")
def ape(shelf: Path, model: Path) -> Path:
    path = shelf / "ape.plan"
    kv("calibrate", model, "--method", "ape", "--set", "mode=given", "--set", "temperature=0.5", "-o", path).fine()
    return path


@pytest.fixture(scope="session")
def kept(shelf: Path, model: Path, coded: Path) -> dict[str, Path]:
    """Documents a, b and c after one prefix, the last one in 4 bits; the prefix; and b alone."""
    (shelf / "prefix.txt").write_text(PREFIX)
    found = {name: shelf / f"{name}.kv" for name in (*TEXTS, "prefix", "alone")}
    for name, text in TEXTS.items():
        (shelf / f"{name}.txt").write_text(text)
        plan = ("--plan", coded) if name == "c" else ()
        kv("save", model, shelf / f"{name}.txt", "--prefix", shelf / "prefix.txt", *plan, "-o", found[name]).fine()
    kv("save", model, shelf / "prefix.txt", "-o", found["prefix"]).fine()
    kv("save", model, shelf / "b.txt", "-o", found["alone"]).fine()
    return found


def written(model: Path, kept: dict[str, Path], names: str, *options: object) -> list[int]:
    paths = [kept[name] for name in names.split()]
    ran = kv("generate", model, *paths, QUESTION, "--tokens", "8", "--json", *options).fine()
    ids: list[int] = ran.document["answers"][0]["ids"]
    return ids


def test_a_document_with_its_prefix_continues_like_the_model_itself(model: Path, kept: dict[str, Path]) -> None:
    loaded = load(str(model))
    ids = loaded.ids(PREFIX + TEXTS["a"] + QUESTION)[None]
    expected = loaded.network.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert written(model, kept, "a") == [token for token in expected if token != 0]
    assert written(model, kept, "a prefix") == written(model, kept, "a")


def test_the_order_of_files_means_nothing(model: Path, kept: dict[str, Path], ape: Path) -> None:
    made = written(model, kept, "a b c")
    assert made == written(model, kept, "c a b") == written(model, kept, "b prefix c a")
    assert written(model, kept, "a b c", "--plan", ape) == written(model, kept, "c b a", "--plan", ape)


def test_positions_and_plans_matter(model: Path, kept: dict[str, Path], ape: Path) -> None:
    """Of a random model other logits are often other tokens; these are."""
    shared = written(model, kept, "a b c")
    assert shared == written(model, kept, "a b c", "--position", "shared")
    assert shared != written(model, kept, "a b c", "--position", "contiguous")
    assert shared != written(model, kept, "a b c", "--plan", ape)
    assert shared != written(model, kept, "a b")


def test_the_file_holds_the_document_alone(model: Path, kept: dict[str, Path]) -> None:
    with safe_open(kept["a"], "pt") as file:
        header = json.loads(file.metadata()["kvtool"])
    tensors = load_file(kept["a"])
    assert tensors["prefix"].numel() == len(PREFIX)
    held = [tensor for name, tensor in tensors.items() if name.startswith("layers.0") and name.endswith(".k")]
    assert held
    assert all(tensor.shape[2] == len(TEXTS["a"]) for tensor in held)
    assert header["document"]["origin"] == len(PREFIX)
    told = kv("inspect", kept["a"], "--json").fine().document["document"]
    assert told["identity"] == header["document"]["identity"]
    assert told["raw"] == 2 * 2 * 2 * 8 * 2 * len(TEXTS["a"])


def test_different_prefixes_are_refused(model: Path, kept: dict[str, Path]) -> None:
    kv("generate", model, kept["a"], kept["alone"], QUESTION).refused("different prefixes")
    record = kv("generate", model, kept["alone"], kept["alone"], QUESTION, "--json", "--tokens", "2").fine().document
    assert record["held"] == 2 * len(TEXTS["b"])  # without any prefix, and twice the same


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "-", "-", "x"), "stdin cannot carry"),
        (("generate", "A", "x", "--position", "stacked"), "bad --position"),
        (("save", "-", "--prefix", "-"), "stdin cannot carry"),
        (("save", "A.txt", "--prefix", "missing.txt"), "no such text"),
    ],
)
def test_refusals(arguments: tuple[str, ...], words: str, model: Path, kept: dict[str, Path], here: Path) -> None:
    (here / "A.txt").write_text("text")
    command, *rest = (str(kept["a"]) if argument == "A" else argument for argument in arguments)
    kv(command, model, *rest).refused(words)


def test_save_after_a_prefix_that_is_cut(model: Path, kept: dict[str, Path], here: Path) -> None:
    """Chunks of the document make no difference under the full plan."""
    shelf = kept["a"].parent
    kv("save", model, shelf / "a.txt", "--prefix", shelf / "prefix.txt", "--chunk", "7", "-o", "cut.kv").fine()
    assert load_file("cut.kv")["tokens"].tolist() == load_file(kept["a"])["tokens"].tolist()
    assert written(model, kept | {"cut": here / "cut.kv"}, "cut b") == written(model, kept, "a b")
