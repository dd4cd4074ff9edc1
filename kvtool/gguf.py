"""GGUF files, dequantised once: transformers takes many seconds to parse one, so the result is kept as a folder.

The folder lies in the user's cache (`$XDG_CACHE_HOME/kvtool` or `~/.cache/kvtool`), named by the file's name,
size, modification time and the version of transformers; it is safe to delete. Where it cannot be written, the
model is simply loaded each time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtool.files import digest


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(network, tokenizer) of one GGUF file; raises what transformers raises for a file that it cannot read."""
    kept = _folder(path)
    if not kept.is_dir():
        network, tokenizer = _parse(path)
        if not _keep(network, tokenizer, kept):
            return network.to(dtype), tokenizer
        del network
    network = AutoModelForCausalLM.from_pretrained(kept, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    return network, AutoTokenizer.from_pretrained(kept, local_files_only=True)


def _folder(path: Path) -> Path:
    facts = path.stat()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = digest(path.name, str(facts.st_size), str(facts.st_mtime_ns), transformers.__version__)
    return root / "kvtool" / f"{path.stem}-{key}"


def _parse(path: Path) -> tuple[Any, Any]:
    with _quiet_tqdm():
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
            "local_files_only": True,
        }
        tokenizer = AutoTokenizer.from_pretrained(**source)
        network = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="sdpa")
    network.hf_quantizer = None  # type: ignore[assignment]  # the weights are plain fp32 now
    del network.config.quantization_config
    return network, tokenizer


def _keep(network: Any, tokenizer: Any, folder: Path) -> bool:
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        scratch.mkdir(parents=True)
        network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        os.replace(scratch, folder)
    except OSError:
        return folder.is_dir()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


@contextlib.contextmanager
def _quiet_tqdm() -> Iterator[None]:
    """The GGUF reader draws a bar of its own that no setting turns off."""
    from tqdm import std  # part of transformers' requirements

    before = std.tqdm.__init__

    def silent(self, *args, **kwargs):
        before(self, *args, **{**kwargs, "disable": True})

    std.tqdm.__init__ = silent
    try:
        yield
    finally:
        std.tqdm.__init__ = before
