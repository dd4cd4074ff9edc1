"""`profile --raw`: the very tensors, of the layers, heads and tokens asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cli.terminal import files, kv
from tests.tolerance import close, same

TEXT = ("--stat", "channels", "--tokens", "40", "--samples", "2")
ALL = ("--raw", "k,v,q,attention")


def layers(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.relative_to(folder).as_posix(): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def test_everything(model: Path, here: Path) -> None:
    ran = kv("profile", model, "-o", "a.trace", *TEXT, *ALL).fine()
    made = layers(here / "a.raw")
    assert list(made) == [f"sample-000{sample}/layer-00{layer}.safetensors" for sample in (0, 1) for layer in (0, 1)]
    for tensors in made.values():
        shapes = {"q": (4, 40, 8), "k": (2, 40, 8), "v": (2, 40, 8), "attention": (4, 40, 40)}
        assert {kind: tuple(tensor.shape) for kind, tensor in tensors.items()} == shapes
        logits = tensors["q"] @ tensors["k"].repeat_interleave(2, 0).mT / 8**0.5
        close(tensors["attention"], (logits + torch.full((40, 40), float("-inf")).triu(1)).softmax(-1))
    assert f"raw tensors: {sum(t.nbytes for each in made.values() for t in each.values()) / 1e3:.1f} kB" in ran.err


def test_a_choice_of_everything(model: Path, here: Path) -> None:
    kv("profile", model, "-o", "all.trace", *TEXT, *ALL).fine()
    kv(
        "profile", model, "-o", "some.trace", *TEXT, *ALL, "--layers", "1", "--heads", "0,1,3", "--raw-tokens", "16"
    ).fine()
    kv("profile", model, "-o", "low.trace", *TEXT, *ALL, "--layers", "0-1", "--heads", "1", "--raw_tokens=999").fine()
    whole, some, low = (layers(here / f"{name}.raw") for name in ("all", "some", "low"))
    assert list(some) == [name for name in whole if "layer-001" in name]
    assert list(low) == list(whole)
    for name, tensors in some.items():
        for kind in "kv":
            same(tensors[kind], whole[name][kind][:, :16])
        same(tensors["q"], whole[name]["q"][[0, 1, 3], :16])
        close(tensors["attention"], whole[name]["attention"][[0, 1, 3], :16, :16])
        same(low[name]["k"], whole[name]["k"][:1])
        same(low[name]["q"], whole[name]["q"][1:2])


def test_the_trace_is_the_same_with_and_without(model: Path, here: Path) -> None:
    kv("profile", model, "-o", "with.trace", *TEXT, *ALL).fine()
    kv("profile", model, "-o", "without.trace", *TEXT).fine()
    assert (here / "with.trace").read_bytes() == (here / "without.trace").read_bytes()


def test_half_precision_halves_the_files(model: Path, here: Path) -> None:
    raw = ("--raw", "k,attention", "--dtype", "bfloat16")
    ran = kv("profile", model, "-o", "a.trace", *TEXT, *raw).fine()
    made = layers(here / "a.raw")
    assert {each["k"].dtype for each in made.values()} == {torch.bfloat16}
    assert f"raw tensors: {sum(t.nbytes for each in made.values() for t in each.values()) / 1e3:.1f} kB" in ran.err


def test_force_leaves_nothing_of_the_earlier_run(model: Path, here: Path) -> None:
    raw = ("--raw", "k", "--raw-tokens", "4")
    kv("profile", model, "-o", "a.trace", *TEXT, *raw).fine()
    (here / "a.trace").unlink()
    kv("profile", model, "-o", "a.trace", *TEXT, *raw).refused("a.raw exists already", "--force")
    kv("profile", model, "-o", "a.trace", *TEXT, *raw, "--samples", "1", "--layers", "1", "--force").fine()
    assert files(here) == {"a.trace", "a.raw/sample-0000/layer-001.safetensors"}
