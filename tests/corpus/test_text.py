"""Text from every kind of source, cut both ways, and a clear word about whatever is wrong with it."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from kvtool.corpus import default
from kvtool.corpus.sources import documents
from kvtool.corpus.text import text
from kvtool.errors import InputError

pytestmark = pytest.mark.real
LINE = "The lamp keeper counts the boats that come home before the fog does. "


@pytest.fixture
def folder(tmp_path):
    """Four documents in three files, and one file that is not text."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("B " + LINE * 40)
    (tmp_path / "deep" / "a.md").write_text("A " + LINE * 40)
    lines = [{"text": "C " + LINE * 40}, {"text": "  "}, {"text": "D short"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    return tmp_path


def stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


def test_a_folder_is_its_text_files_in_order(folder):
    assert [document[:7] for document in documents(str(folder))] == [
        "B The l",
        "C The l",
        "D short",
        "A The l",
    ]


def test_pack_cuts_windows_of_exactly_the_length_and_never_one_twice(demo, folder):
    corpus = text(demo, [folder], tokens=40, samples=12)
    assert {len(sample.tokens) for sample in corpus.samples} == {40}
    assert corpus.provenance["tokens"] == 480
    stream = torch.cat([demo.ids(document) for document in documents(str(folder))])
    assert len(stream) // 40 >= 12


def test_pack_marks_where_documents_meet(demo, folder):
    samples = text(demo, folder, tokens=500, samples=3).samples
    ends = sum(int((sample.tokens == demo.tokenizer.eos_token_id).sum()) for sample in samples)
    assert 1 <= ends <= 3


def test_documents_start_where_documents_start(demo, folder):
    samples = text(demo, folder, tokens=30, samples=3, cut="documents").samples
    starts = {demo.tokenizer.decode(sample.tokens)[:2] for sample in samples}
    assert starts == {"A ", "B ", "C "}


def test_documents_may_be_shorter_than_asked(demo, folder):
    samples = text(demo, folder, tokens=5000, samples=3, cut="documents").samples
    assert all(500 < len(sample.tokens) < 1000 for sample in samples)


def test_another_field(demo, tmp_path):
    path = tmp_path / "news.jsonl"
    path.write_text(json.dumps({"body": LINE * 9, "text": 3}))
    assert len(text(demo, path, field="body", tokens=50, samples=1).samples[0].tokens) == 50


def test_stdin_is_text_or_json_lines(monkeypatch):
    stdin(monkeypatch, "plain\n{text}")
    assert documents("-") == ["plain\n{text}"]
    stdin(monkeypatch, '{"text": "one"}\n\n{"text": "two"}\n')
    assert documents("-") == ["one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert documents(str(tmp_path / "a.txt")) == ["word"]


def test_the_default_text_has_halves(demo):
    both = [text(demo, "default", tokens=64, samples=4, half=half) for half in default.HALVES]
    for corpus, half in zip(both, default.HALVES, strict=True):
        assert corpus.provenance["sources"] == [default.SOURCE]
        assert corpus.provenance["options"]["half"] == half
    assert both[0].provenance["hash"] != both[1].provenance["hash"]


def test_too_little_text_is_counted(demo, folder):
    with pytest.raises(InputError, match=r"got 3 samples of 500 tokens, expected 50\. Ask for fewer"):
        text(demo, folder, tokens=500, samples=50)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "an empty source"),
        ("a.txt", b" \n\t", "an empty source"),
        ("a.txt", b"caf\xe9", "is not text: got byte 0xe9 at 3, expected UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "line 2 of .* has no text under 'text': got .'body'."),
        ("a.jsonl", b'{"text": "a"}\n[1]', "line 2 of .* has no text under 'text': got list"),
        ("a.jsonl", b'{"text": 5}', "line 1 of .* has no text under 'text'"),
        ("a.jsonl", b"words", "line 1 of .* is not JSON"),
        ("a.jsonl", b"\n", "an empty source"),
    ],
)
def test_files_that_hold_no_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        documents(str(tmp_path / name))


def test_a_folder_without_text(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match="a folder without text"):
        documents(str(tmp_path))


def test_a_missing_source(tmp_path):
    with pytest.raises(InputError, match="no such text"):
        documents(str(tmp_path / "gone.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "slices"}, "expected pack or documents"),
        ({"tokens": 15}, "16 or more tokens"),
        ({"samples": 0}, "1 or more samples"),
        ({"half": "third"}, "calibration or held-out"),
    ],
)
def test_options_out_of_range(demo, options, message):
    with pytest.raises(InputError, match=message):
        text(demo, **options)


def test_only_the_default_text_has_halves(demo, folder):
    with pytest.raises(InputError, match="only the default text has halves"):
        text(demo, folder, half="held-out")
