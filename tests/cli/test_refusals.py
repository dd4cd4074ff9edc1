"""Bad usage and bad input: exit code 2, one line that says what, where and what to do, and nothing written or left."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.terminal import files, kv
from tests.cli.tiny import RAZOR, REPLAY, save

NEAR = "id you mean"
USAGE = [
    ("profil {model}", [NEAR, "profile"]),
    ("profile", ["MODEL", "--help"]),
    ("profile {model} --tokns 3", ["--tokns", NEAR, "--tokens"]),
    ("profile {model} --tokens many", ["--tokens"]),
    ("profile {model} {model}", ["extra argument"]),
    ("calibrate {trace}", ["--method"]),
    ("merge {trace} {second}", ["--output"]),
    ("replay {model}", ["--plan"]),
    ("replay {model} --plan {plan} --chunk -3", ["--chunk", "-3"]),
]
NAMES = [
    ("profile {model} --stat atention", ["atention", NEAR, "'attention'"]),
    ("profile {model} --for razr", ["razr", NEAR, "'razor'"]),
    ("profile {model} --for duo", ["duo needs no statistics"]),
    ("profile {model} --set nedle.lengths=300", ["nedle", NEAR, "'needle'"]),
    ("profile {model} --set needle.lenghts=300", ["lenghts", NEAR, "'lengths'"]),
    ("calibrate {trace} --method raser", ["raser", NEAR, "'razor'"]),
    ("calibrate {trace} --method razor --set recnt=3", ["recnt", NEAR, "'recent'"]),
    ("replay {model} --plan {plan} --tasks speeed", ["speeed", NEAR, "'speed'"]),
    ("replay {model} --plan {plan} --set text.tokns=3", ["tokns", NEAR, "'tokens'"]),
    ("replay {model} --plan {plan} --tasks speed --set text.tokens=3", ["task that does not run", "text"]),
    ("replay {model} --plan {plan} --fail-if recal<0.9", ["recal", NEAR, "'recall'"]),
    ("replay {model} --plan {plan} --tasks speed --fail-if recall<0.9", ["recall", "bytes_ratio"]),
    ("methods raser", ["raser", NEAR, "'razor'"]),
    ("methods razor --probes", ["one thing at a time", "razor --probes"]),
    ("methods --statistics --probes", ["one thing at a time"]),
    ("analyze {trace} spectrum", ["spectrum", NEAR, "'spectra'"]),
]
VALUES = [
    ("profile {model} --set needle", ["'needle'", "key=value"]),
    ("profile {model} --set =3", ["'=3'", "key=value"]),
    ("profile {model} --set lengths=300", ["lengths=300", "what.option=value"]),
    ("profile {model} --set needle.lengths=long", ["lengths of needle", "'long'", "a whole number"]),
    ("profile {model} --set needle.lengths=", ["lengths of needle", "one value or more"]),
    ("profile {model} --set needle.depths=deep", ["depths of needle", "'deep'", "a number"]),
    ("profile {model} --set needle.samples=1.5", ["samples of needle", "'1.5'", "a whole number"]),
    ("profile {model} --set repeat.high=top", ["high of repeat", "'top'", "a whole number"]),
    ("profile {model} --set repeat.high=999", ["token ids", "257"]),
    ("profile {model} --set needle.lengths=9", ["too short", "9 tokens"]),
    ("profile {model} --set needle.depths=2 --set needle.lengths=300", ["depth", "0 to 1"]),
    ("profile {model} --samples 0", ["0 samples"]),
    ("profile {model} --tokens 3", ["3 tokens"]),
    ("profile {model} --cut packs", ["'packs'", "documents"]),
    ("profile {model} --dtype float31", ["float31", "float32"]),
    ("profile {model} --device toaster", ["toaster", "cpu"]),
    ("calibrate {trace} --method razor --set recent=x", ["recent of razor", "'x'", "a whole number"]),
    ("calibrate {trace} --method razor --set compensate=perhaps", ["compensate of razor", "'perhaps'"]),
    ("calibrate {trace} --method razor --set induction=nan", ["induction of razor", "'nan'"]),
    ("calibrate {trace} --method razor --set induction=2", ["induction", "0 to 1"]),
    ("calibrate {trace} --method streaming --set position=middle", ["position", "'middle'", "original, reindex"]),
    ("calibrate {model} --method duo --lengths ,", ["lengths of duo", "one value or more"]),
    ("calibrate {model} --method duo --steps 0", ["steps", "got 0", "1 or more"]),
    ("calibrate {model} --method duo --lengths 300,-5", ["lengths", "1 or more"]),
    ("replay {model} --plan {plan} --fail-if recall=1", ["'recall=1'", "recall<0.9"]),
    ("replay {model} --plan {plan} --fail-if recall<nan", ["'recall<nan'"]),
    ("replay {model} --plan {plan} --tasks ,", ["no tasks"]),
    ("replay {model} --plan {plan} --lengths long", ["lengths of passkey", "'long'"]),
    ("replay {model} --plan {plan} --keys 0", ["keys", "1 or more"]),
    ("replay {model} --plan {plan} --tasks text --lengths 400", ["--lengths", "none", "text"]),
    ("replay {model} --plan {plan} --tasks needle,text --keys 1", ["--keys", "none", "needle, text"]),
    ("replay {model} --plan {plan} --set passkey.batch=0", ["batch", "1 or more"]),
    ("replay {model} --plan {plan} --set speed.steps=0", ["steps", "1 or more"]),
    ("replay {model} --plan {plan} --set text.tokens=0", ["tokens", "1 or more"]),
    ("replay {model} --plan {plan} --set generation.tokens=0", ["tokens", "1 or more"]),
    ("replay {model} --plan {plan} --tasks passkey --lengths 10", ["too short", "10 tokens"]),
    ("replay {model} --plan {plan} --tasks passkey --lengths 400 --depths 7", ["depth", "0 to 1"]),
]
FILES = [
    ("inspect nowhere", ["no such file", "nowhere"]),
    ("inspect {shelf}", ["cannot read", "directory"]),
    ("inspect {truncated}", ["truncated.trace", "not a whole safetensors file"]),
    ("inspect {empty}", ["empty.trace", "not a whole safetensors file"]),
    ("inspect {latin}", ["latin.txt", "not a whole safetensors file"]),
    ("inspect {foreign}", ["foreign.safetensors", "not written by kvtool"]),
    ("inspect {lines}", ["lines.jsonl is JSON", "jq"]),
    ("merge - - -o out", ["stdin cannot carry two files", "2 times"]),
    ("compose - {plan} - -o out", ["stdin cannot carry two files"]),
    ("save {model} - --plan -", ["stdin cannot carry two files"]),
    ("inspect {model}/model.safetensors", ["not written by kvtool"]),
    ("calibrate nowhere.trace --method razor", ["no such trace", "nowhere.trace"]),
    ("calibrate {truncated} --method razor", ["truncated.trace", "not a whole safetensors file"]),
    ("calibrate {foreign} --method razor", ["not written by kvtool"]),
    ("calibrate {plan} --method razor", ["razor.plan", "got a plan", "expected a trace"]),
    ("calibrate {channels} --method razor", ["no statistic 'induction'", "--stat induction"]),
    ("merge {trace} {plan} -o out", ["razor.plan", "got a plan", "expected a trace"]),
    ("merge {trace} {trace} -o out", ["the same", "--seed"]),
    ("merge {trace} -o out", ["1 trace", "two or more"]),
    ("merge {trace} {other_trace} -o out", ["different models"]),
    ("analyze {plan}", ["got a plan", "expected a trace"]),
    ("analyze {channels} spectra", ["no statistic 'gram'", "--stat gram"]),
    ("compose {plan} {trace} -o out", ["got a trace", "expected a plan"]),
    ("compose {plan} {plan} -o out", ["two plans fill the slot 'keep'"]),
    ("compose {plan} -o out", ["1 plan", "two or more"]),
    ("compose {plan} {other_plan} -o out", ["another model"]),
    ("replay {model} --plan nowhere", ["no such plan", "nowhere"]),
    ("replay {model} --plan {trace}", ["got a trace", "expected a plan"]),
    ("replay {model} --plan {truncated}", ["not a whole safetensors file"]),
    ("replay {model} --plan {other_plan}", ["another model", "weights"]),
    ("profile {model} --resume -o {other_trace}", ["cannot resume", "another model"]),
    ("profile {model} --stat gram --resume -o {channels}", ["cannot resume", "statistics"]),
    ("profile {model} --resume -o {plan}", ["got a plan", "expected a trace"]),
    ("profile {model} --resume -o -", ["--resume", "-o -"]),
]
MODELS = [
    ("profile ./nowhere", ["no such model folder", "./nowhere"]),
    ("profile nowhere", ["cannot load the model 'nowhere'"]),
    ("profile nowhere.gguf", ["no such GGUF file", "nowhere.gguf"]),
    ("profile {shelf}", ["cannot load the model", "a folder without config.json"]),
    ("profile {plan}", ["cannot load the model", "razor.plan", "another kind of file"]),
    ("profile ''", ["cannot load the model ''", "a folder without config.json"]),
    ("profile {nan_model}", ["NaN", "up_proj"]),
    ("replay {nan_model} --plan {plan}", ["NaN", "up_proj"]),
    ("calibrate {nan_model} --method duo", ["NaN", "up_proj"]),
]
TEXTS = [
    ("profile {model} --text nowhere.txt", ["no such text", "nowhere.txt"]),
    ("profile {model} --text {short}", ["too little text", "short.txt", "fewer"]),
    ("profile {model} --text {latin}", ["latin.txt", "not text", "UTF-8"]),
    ("profile {model} --text {lines}", ["line 1", "lines.jsonl", "'text'"]),
    ("profile {model} --text {lines} --field body", ["too little text"]),
    ("profile {model} --text -", ["empty source", "-"]),
    ("replay {model} --plan {plan} --tasks text --set text.source=nowhere.txt", ["no such text"]),
    ("replay {model} --plan {plan} --tasks text --set text.source={short}", ["too little text"]),
]
OUTPUTS = [
    ("profile {model} -o nowhere/a.trace", ["nowhere", "mkdir -p 'nowhere'"]),
    ("profile {model} -o {empty}/a.trace", ["folder is a file", "empty.trace"]),
    ("profile {model} -o /proc/a.trace", ["cannot write /proc/a.trace"]),
    ("profile {model} -o {shelf} --force", ["is a folder"]),
    ("calibrate {trace} --method razor -o /proc/a.plan", ["cannot write /proc/a.plan"]),
    ("calibrate {trace} --method razor -o {plan}", ["exists already", "--force"]),
    ("merge {trace} {second} -o /proc/a.trace", ["cannot write /proc/a.trace"]),
    ("compose {plan} {lossless} -o {plan}", ["exists already", "--force"]),
    ("replay {model} --plan {plan} -o /proc/a.json", ["cannot write /proc/a.json"]),
    ("replay {model} --plan {plan} -o {plan}", ["exists already", "--force"]),
    ("cost {model} --hardware h200 --figure {figure}", ["exists already", "another --figure", "--force"]),
]
RAW = [
    ("profile {model} --raw k,w", ["'w'", "attention, k, q, v"]),
    ("profile {model} --raw ''", ["kind of raw tensor"]),
    ("profile {model} --raw k -o -", ["--raw needs a file name"]),
    ("profile {model} --raw k --layers 2", ["--layers", "0 to 1"]),
    ("profile {model} --raw k --layers one", ["--layers", "0,3-5"]),
    ("profile {model} --raw k --heads 4", ["--heads", "0 to 3"]),
    ("profile {model} --raw k --raw-tokens 0", ["--raw-tokens", "1 or more"]),
    ("profile {model} --layers 1", ["--layers without --raw"]),
    ("profile {model} --raw-tokens 8", ["--raw-tokens without --raw"]),
    ("profile {model} --stat induction --raw k", ["--raw writes text samples", "--stat channels"]),
]


@pytest.fixture(scope="session")
def places(shelf: Path, model: Path, induction: Path, second: Path, plan: Path, lossless: Path) -> dict[str, Path]:
    """Every file that the cases name, sound and broken."""
    made = {"shelf": shelf, "model": model, "trace": induction, "second": second, "plan": plan, "lossless": lossless}
    made |= {"nan_model": save(shelf / "nan model", broken=True), "other_model": save(shelf / "other model", seed=1)}
    made |= {name: shelf / f"{name}.trace" for name in ("truncated", "empty", "channels", "other_trace")}
    made |= {
        "foreign": shelf / "foreign.safetensors",
        "other_plan": shelf / "other.plan",
        "lines": shelf / "lines.jsonl",
    }
    made |= {name: shelf / f"{name}.txt" for name in ("short", "latin")}
    made["figure"] = shelf / "old.png"
    made["figure"].write_bytes(b"")
    made["truncated"].write_bytes(induction.read_bytes()[:-9])
    made["empty"].write_bytes(b"")
    save_file({"weight": torch.ones(3)}, made["foreign"])
    made["short"].write_text("Not much to read here.")
    made["latin"].write_bytes("Überall Käse".encode("latin-1") * 30)
    made["lines"].write_text(json.dumps({"body": "A line."}))
    kv("profile", model, "--stat", "channels", "--tokens", "32", "--samples", "1", "-o", made["channels"]).fine()
    kv("profile", made["other_model"], *RAZOR, "-o", made["other_trace"]).fine()
    kv("calibrate", made["other_trace"], "--method", "razor", "--set", "recent=8", "-o", made["other_plan"]).fine()
    return made


@pytest.mark.parametrize(
    ("command", "words"),
    [*USAGE, *NAMES, *VALUES, *FILES, *MODELS, *TEXTS, *OUTPUTS, *RAW],
    ids=lambda part: str(part)[:70],
)
def test_refused(command: str, words: list[str], places: dict[str, Path], here: Path) -> None:
    before = {path: path.stat() for path in places["shelf"].rglob("*")}
    arguments = shlex.split(command.format(**{name: shlex.quote(str(path)) for name, path in places.items()}))
    kv(*arguments).refused(*words)
    assert not files(here)
    assert {path: path.stat() for path in places["shelf"].rglob("*")}.keys() == before.keys()
    assert all(path.stat().st_mtime_ns == was.st_mtime_ns for path, was in before.items() if path.is_file())


@pytest.mark.parametrize("command", ["inspect -", "calibrate - --method razor", "replay {model} --plan -", "analyze -"])
@pytest.mark.parametrize("content", ["nothing", "half", "noise"])
def test_refused_on_stdin(command: str, content: str, model: Path, induction: Path, here: Path) -> None:
    stdin = {"nothing": b"", "half": induction.read_bytes()[:-1], "noise": b"no such command\n" * 9}[content]
    words = ["stdin", "command before"] if content == "nothing" else ["stdin is not a whole safetensors file"]
    kv(*shlex.split(command.format(model=shlex.quote(str(model)))), stdin=stdin).refused(*words)
    assert not files(here)


def test_mistakes_are_told_before_the_model_is_loaded(
    places: dict[str, Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("profile", "calibrate", "replay"):
        monkeypatch.setattr(f"kvtool.commands.{command}.load", lambda *_, **__: pytest.fail("the model was loaded"))
    model, plan, trace = (places[name] for name in ("model", "plan", "trace"))
    kv("profile", model, "--stat", "atention").refused()
    kv("profile", model, "--set", "needle.lenghts=3").refused()
    kv("profile", model, "--set", "needle.lengths=long").refused()
    kv("profile", model, "--raw-tokens", "3").refused()
    kv("profile", model, "-o", "/proc/a.trace").refused()
    kv("calibrate", model, "--method", "duo", "--set", "stepps=3").refused()
    kv("calibrate", trace, "--method", "duo", "-o", "/proc/a.plan").refused()
    kv("replay", model, "--plan", plan, "--tasks", "speeed").refused()
    kv("replay", model, "--plan", plan, "--fail-if", "recal<1").refused()
    kv("replay", model, "--plan", plan, "-o", "/proc/a.json").refused()
    kv("replay", model, "--plan", trace).refused()


def test_a_truncated_model(model: Path, here: Path) -> None:
    shutil.copytree(model, here / "half")
    weights = here / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    kv("profile", here / "half", "-o", "a.trace").refused("half")
    assert not (here / "a.trace").exists()


def test_a_model_without_a_tokenizer(model: Path, here: Path) -> None:
    shutil.copytree(model, here / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    kv("profile", here / "mute", "-o", "a.trace").refused("mute")
    assert not (here / "a.trace").exists()


def test_cuda_where_there_is_none(model: Path, here: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    kv("profile", model, "--device", "cuda").refused("no such device", "--device cpu")


def test_an_unforeseen_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(*_: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("kvtool.commands.methods.run", fall)
    kv("methods").refused("ZeroDivisionError: first second", "--debug", code=1)
    with pytest.raises(ZeroDivisionError):
        kv("--debug", "methods")


def test_a_long_list_is_left_out_where_a_name_is_near() -> None:
    near, far = kv("methods", "raser"), kv("methods", "nothing-like-it")
    assert "one of" not in near.err
    assert len(near.err) < 80
    assert "one of actqkv, adakv, " in far.err
    assert "Did you mean" not in far.err


def test_a_full_disk_is_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    monkeypatch.setattr("kvtool.commands.methods.run", fill)
    kv("methods").refused("cannot go on: No space left on device: a file", code=1)


def test_a_task_refuses_before_the_others_run(model: Path, plan: Path, here: Path) -> None:
    kv("replay", model, "--plan", plan, *REPLAY, "--set", "speed.repeats=0", "-o", "v.json").refused("repeats")
    assert not files(here)
