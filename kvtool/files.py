"""Every box of the pipeline is one file: safetensors with a JSON header. This module reads and writes them.

The header lives in the safetensors metadata under the key `kvtool` as one JSON document that always has `kind`
("trace", "plan", …), `schema` (an integer) and `kvtool` (the version that wrote it). `-` stands for stdin and
stdout. A file appears under its own name only when it is whole: bytes go to a temporary name beside it, then rename.
The bytes depend on the content alone, so equal inputs give equal files.

It does not know what a trace or a plan contains.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from kvtool import __version__
from kvtool.errors import InputError

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def write(path: str | Path, header: Header, tensors: Tensors, *, force: bool = False) -> str:
    """Write one file and return its path ("-" after writing to stdout).

    Raises InputError when `path` exists and `force` is false, or when the folder cannot be written.
    """
    document = json.dumps({"kvtool": __version__, **header}, sort_keys=True, separators=(",", ":"))
    payload = save_bytes(_apart(tensors), metadata={"kvtool": document})
    if str(path) == "-":
        sys.stdout.buffer.write(payload)
        sys.stdout.buffer.flush()
        return "-"
    check_output(path, force=force)
    replace(Path(path), payload)
    return str(path)


def _apart(tensors: Tensors) -> Tensors:
    """The same tensors, contiguous, none sharing memory with another: safetensors refuses what does."""
    seen: set[int] = set()
    made = {}
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        made[name] = tensor.clone() if tensor.numel() and tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return made


def check_output(path: str | Path, *, force: bool = False, option: str = "-o") -> None:
    """Fail before the work starts, not after it: is `path`, which `option` named, free and its folder writable?"""
    if str(path) == "-":
        return
    path = Path(path)
    if path.is_dir():
        raise InputError("the output is a folder", got=path, expected="the name of a file")
    if is_stream(path):
        return
    if path.exists() and not force:
        raise InputError(f"{path} exists already", remedy=f"choose another {option}, or pass --force to overwrite it")
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError("the output's folder is a file", got=path.parent, remedy=f"choose another {option}")
    if not path.parent.is_dir():
        raise InputError(
            "the output's folder does not exist", got=path.parent, remedy=f"make it first: mkdir -p '{path.parent}'"
        )
    scratch = _scratch(path)
    try:
        scratch.touch()
        scratch.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}", got=error.strerror, remedy=f"choose another {option}") from error


def one_stdin(*sources: str | None) -> None:
    """Raise InputError when more than one of these files is stdin, which can be read once."""
    if sources.count("-") > 1:
        raise InputError("stdin cannot carry two files", got=f"- {sources.count('-')} times", remedy="name the others")


def replace(path: Path, payload: bytes) -> None:
    """Write `payload` under a temporary name beside `path`, then rename it into place; pipes and devices are just
    written to."""
    scratch = _scratch(path)
    try:
        if is_stream(path):
            path.write_bytes(payload)
            return
        scratch.write_bytes(payload)
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"cannot write {path}", got=error.strerror) from error
    finally:
        scratch.unlink(missing_ok=True)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def is_stream(path: Path) -> bool:
    """A pipe, /dev/null, >(command): nothing that could be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def read(path: str | Path, *, kind: str | None = None, schema: int | None = None) -> tuple[Header, Tensors]:
    """Read a file (or stdin for "-") into (header, tensors).

    Raises InputError when the file is missing, truncated, not from kvtool, or not of the wanted `kind`/`schema`.
    """
    payload = _payload(path)
    path = "stdin" if str(path) == "-" else path
    try:
        tensors = load_bytes(payload)
    except (SafetensorError, struct.error, ValueError, KeyError) as error:
        if payload.lstrip()[:1] == b"{":
            raise InputError(
                f"{path} is JSON", expected="a trace, a plan or a snapshot", remedy="read it with jq"
            ) from error
        raise InputError(
            f"{path} is not a whole safetensors file",
            got=str(error) or type(error).__name__,
            remedy="write it again; a file that kvtool finished is always whole",
        ) from error
    header = _header(path, payload)
    if kind and header["kind"] != kind:
        raise InputError(f"{path} is of another kind", got=f"a {header['kind']}", expected=f"a {kind}")
    if schema is not None and header["schema"] != schema:
        raise InputError(
            f"{path} has another schema version",
            got=header["schema"],
            expected=schema,
            remedy="make it again with this version of kvtool",
        )
    return header, tensors


def _payload(path: str | Path) -> bytes:
    if str(path) == "-":
        payload = sys.stdin.buffer.read()
        if not payload:
            raise InputError(
                "nothing came on stdin", expected="a kvtool file", remedy="did the command before it fail?"
            )
        return payload
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError("no such file", got=path) from error
    except OSError as error:
        raise InputError(f"cannot read {path}", got=error.strerror) from error


def _header(path: str | Path, payload: bytes) -> Header:
    (length,) = struct.unpack("<Q", payload[:8])
    metadata = json.loads(payload[8 : 8 + length]).get("__metadata__", {})
    try:
        header = json.loads(metadata["kvtool"])
        header["kind"], header["schema"]
    except (KeyError, json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{path} was not written by kvtool", expected="a trace, a plan or a snapshot") from error
    return header


def digest(*parts: bytes | str | torch.Tensor) -> str:
    """Short content hash (16 hex digits of BLAKE2b) for fingerprints of corpora and weights."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.contiguous().view(torch.uint8).numpy().tobytes()
        state.update(part.encode() if isinstance(part, str) else part)
        state.update(b"\0")
    return state.hexdigest()
