"""save, generate and inspect: a document's cache as a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import load
from tests.cli.terminal import kv
from tests.cli.tiny import save

TEXT = "The cache of a document is read once and written down, so that nobody has to read the document again. " * 3
PROMPT = "And then "


@pytest.fixture(scope="session")
def document(shelf: Path) -> Path:
    path = shelf / "a document.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def coded(shelf: Path, model: Path) -> Path:
    path = shelf / "cachegen.plan"
    kv("calibrate", model, "--method", "cachegen", "--set", "level=3", "-o", path).fine()
    return path


@pytest.fixture(scope="session")
def snapshot(shelf: Path, model: Path, document: Path, coded: Path) -> Path:
    path = shelf / "document.kv.safetensors"
    kv("save", model, document, "--plan", coded, "-o", path).fine()
    return path


def test_save_tells_its_bytes(model: Path, document: Path, coded: Path, here: Path) -> None:
    ran = kv("save", model, document, "--plan", coded, "--json").fine()
    record = ran.document
    assert record["output"] == "a document.kv.safetensors"
    assert (record["kind"], record["method"], record["tokens"]) == ("snapshot", "cachegen", len(TEXT))
    assert record["bytes"]["raw"] == 2 * 2 * 2 * 8 * 2 * len(TEXT)
    assert record["bytes"]["file"] == Path(record["output"]).stat().st_size
    assert record["bytes"]["held"] < record["bytes"]["raw"]
    kv("save", model, document, "--plan", coded).refused("--force")


def test_the_full_cache_continues_like_the_model_itself(model: Path, document: Path, here: Path) -> None:
    kv("save", model, document, "-o", "full.kv").fine()
    (record,) = kv("generate", model, "full.kv", PROMPT, "--tokens", "12", "--json").fine().document["answers"]
    loaded = load(str(model))
    ids = torch.cat([loaded.ids(TEXT), loaded.ids(PROMPT)])[None]
    expected = loaded.network.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert record["ids"] == [token for token in expected if token != 0]
    printed = kv("generate", model, "full.kv", PROMPT, "--tokens", "12").fine()
    assert printed.out.decode() == record["text"] + "\n"


def test_a_plan_continues_like_its_own_cache(model: Path, snapshot: Path, coded: Path) -> None:
    from kvtool import plan

    (record,) = kv("generate", model, snapshot, PROMPT, "--tokens", "6", "--json").fine().document["answers"]
    loaded = load(str(model))
    cache = SegmentCache(loaded, plan.read(str(coded)), prompt_length=len(TEXT))
    with loaded.served(), torch.no_grad():
        loaded.network(input_ids=loaded.ids(TEXT)[None], past_key_values=cache)
        ids, made = loaded.ids(PROMPT), []
        for _ in range(6):
            ids = loaded.network(input_ids=ids[None], past_key_values=cache).logits[0, -1:].argmax(-1)
            made.append(int(ids))
    assert record["ids"] == made[: len(record["ids"])]
    assert len(record["ids"]) == 6 or made[len(record["ids"])] == 0


def test_a_pipe(model: Path, document: Path, coded: Path, snapshot: Path) -> None:
    """The file through stdout and stdin is the same, and so is what follows."""
    ran = kv("save", model, document, "--plan", coded, "-o", "-").fine()
    assert ran.out == snapshot.read_bytes()
    there = kv("generate", model, "-", PROMPT, "--tokens", "4", stdin=ran.out).fine()
    assert there.out == kv("generate", model, snapshot, PROMPT, "--tokens", "4").fine().out


def test_a_document_from_stdin_has_a_name(model: Path, here: Path) -> None:
    ran = kv("save", model, "-", "--json", stdin=TEXT.encode()).fine()
    assert (ran.document["output"], ran.document["document"]) == ("stdin.kv.safetensors", "stdin")
    assert ran.err.startswith("stdin: ")


def test_inspect_tells_a_snapshot(snapshot: Path) -> None:
    ran = kv("inspect", snapshot, "--json").fine()
    assert ran.document["kind"] == "snapshot"
    assert ran.document["document"]["tokens"] == len(TEXT)
    for word in ("keys and values in 16 bits", "held by the cache", "in the file", "cachegen"):
        assert word in ran.err
    assert "layers.0" not in ran.err.split("tensors")[0]


def test_another_model_is_refused(snapshot: Path, here: Path) -> None:
    save(here / "other", seed=1)
    kv("generate", "other", snapshot, PROMPT).refused("another model")


def test_another_dtype_is_refused(model: Path, snapshot: Path) -> None:
    kv("generate", model, snapshot, PROMPT, "--dtype", "bfloat16").refused("--dtype float32")


def test_damage_is_refused(model: Path, snapshot: Path, here: Path) -> None:
    tensors = load_file(snapshot)
    with safe_open(snapshot, "pt") as file:
        header = file.metadata()
    words = next(name for name in tensors if name.endswith("stream.words"))
    shorter = tensors | {words: tensors[words][:-1]}
    missing = {name: tensor for name, tensor in tensors.items() if name != words}
    emptied = {**json.loads(header["kvtool"]), "layers": [{"kind": "Nothing known"}] * 2}
    for name, held, told in (
        ("a", shorter, header),
        ("b", missing, header),
        ("c", tensors, {"kvtool": json.dumps(emptied)}),
    ):
        save_file(held, here / name, metadata=told)
        kv("generate", model, here / name, PROMPT).refused("damaged")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("save", "MODEL", "missing.txt"), "no such text"),
        (("save", "MODEL", "default", "--tokens", "-1"), "bad --tokens"),
        (("generate", "MODEL", "FILE", ""), "empty prompt"),
        (("generate", "MODEL", "-", "-"), "stdin cannot carry"),
        (("generate", "MODEL", "PLAN", "x"), "another kind"),
    ],
)
def test_refusals(arguments: tuple[str, ...], words: str, model: Path, snapshot: Path, coded: Path, here: Path) -> None:
    names = {"MODEL": model, "FILE": snapshot, "PLAN": coded}
    kv(*[names.get(argument, argument) for argument in arguments]).refused(words)
