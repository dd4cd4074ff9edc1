"""ShadowKV: keys of few directions, mean keys of chunks that choose, odd chunks exact; the bulk far away.

Sun et al., arXiv 2410.21465, ICML 2025.

    keys before RoPE of all KV heads of a layer, side by side:  X [t, C],  C = K·D;   X ≈ (X V) Vᵀ, V: `rank` directions
    landmark of a chunk of `chunk` entries: the mean of its keys after RoPE;   the `outliers` chunks of each KV head in
    which some key agrees least with it, by cosine, are held as they came, keys and values, and always read
    p = max_g softmax_chunks(scale · q_g · landmark);   a step reads the chunks of largest p, keys rebuilt as RoPE(z Vᵀ)

`mode=prompt` takes V from the prompt; what is decoded later stays raw, and is always read, as are the last `local`
chunks of the prompt and what does not fill one. `mode=calibrated`, ours, has V from texts, so that what is decoded is
encoded, too, and no sequence holds a basis. Everything but outliers, landmarks, sinks and recent entries lives in host
memory with `slow`.

Where we depart from the released code (bytedance/ShadowKV, a21f5a9; cards C2, B24): its factors of the keys stay on the
GPU and values alone are fetched; here `slow` is of both. Its factors are of the whole prompt, here of what leaves the
local chunks. It takes a prompt for decoding unless it is longer than 4,096 tokens, divides by √128 whatever the head,
and caches chunks that were fetched at the last step. Landmarks of outliers are held. Its 48 outliers are meant for
prompts beyond 60,000 tokens, hence the default here. Layers with a sliding window of their own stay raw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Principal
from kvtool.encoding.transforms import Join, Linear
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.methods._ranks import principal
from kvtool.options import at_least
from kvtool.slots import RAW, Read, Store

STATISTICS = ("gram",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a step reads, a share of all when at most 1, else a count. mode: directions of keys that
    each prompt makes (prompt), or texts have made (calibrated). rank: how many, a share of a layer's key channels when
    at most 1, else a count. chunk: entries that are read together. outliers: chunks of each KV head that are held as
    they came. local: newest chunks of a prompt that stay raw. sink: first entries that do. slow: the rest lives in host
    memory."""

    budget: float = 0.1
    mode: Literal["prompt", "calibrated"] = "prompt"
    rank: float = 0.15625
    chunk: int = 8
    outliers: int = 4
    local: int = 4
    sink: int = 0
    slow: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, "chunk")
        at_least(0, self, "outliers", "local", "sink")
        for name in ("budget", "rank"):
            if getattr(self, name) <= 0:
                raise InputError(f"bad option {name}", got=getattr(self, name), expected="more than 0")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: values are all held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    width = g.kv_heads * g.head_dim
    rank = max(1, round(options.rank * width if options.rank <= 1 else options.rank))
    if rank > width:
        raise InputError("more directions than channels", got=rank, expected=f"at most {width}")
    free = [layer for layer in range(g.layers) if g.windows[layer] is None]
    index, keys, evidence = torch.full((g.layers, g.kv_heads), RAW, dtype=torch.int32), [], {}
    if options.mode == "prompt":
        keys = [Encoding(transforms=(Join(g.kv_heads), Principal(rank)), rotated=False)]
        index[free] = 0
    else:
        seen = context.seen["gram"]
        energy, basis = principal(seen["k_pre"] / seen["tokens"].clamp_min(1))
        for layer in free:
            index[layer] = len(keys)
            v = basis[layer, :, :rank].float()[None]
            step = Linear(v.contiguous(), v.transpose(1, 2).contiguous())
            keys.append(Encoding(transforms=(Join(g.kv_heads), step), rotated=False))
        evidence["kept"] = (energy[:, :rank].sum(1) / energy.sum(1).clamp_min(torch.finfo(energy.dtype).tiny)).float()
    store = Store(
        tuple(keys), (Encoding(),) * len(keys), index, options.sink, options.local * options.chunk, options.chunk,
        once=options.mode == "prompt",
    )  # fmt: skip
    budget = torch.full((g.layers,), options.budget)
    read = Read(
        budget, unit=options.chunk, summary="mean", softmax=True, sink=options.sink,
        recent=options.local * options.chunk, outliers=options.outliers, exact=options.outliers > 0, slow=options.slow,
    )  # fmt: skip
    return Decision(store=store, read=read, evidence=evidence)
