"""Raw tensors to disk, beside the statistics, for people who want the data itself.

One safetensors file per (sample, layer): `q` [h,T,D], `k`, `v` [h,T,D] after RoPE, `attention` [h,T,T], of the
chosen heads. Query heads index q and attention; a KV head is written when one of its query heads is chosen. The
size is known before the first byte is written.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvtool.errors import InputError, unknown
from kvtool.model import Geometry
from kvtool.statistics._base import States
from kvtool_kernels.attend.reference import logits

KINDS = ("k", "v", "q", "attention")


@dataclass
class Raw:
    """What to write and where; `samples` numbers the samples by their `id`, as they come unless given."""

    folder: Path
    kinds: tuple[str, ...]
    geometry: Geometry
    layers: list[int]
    heads: list[int]
    tokens: int | None = None
    samples: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of raw tensor", kind, KINDS)

    @property
    def kv_heads(self) -> list[int]:
        return sorted({head // self.geometry.group for head in self.heads})

    def nbytes(self, lengths: list[int], element: int = 4) -> int:
        """Bytes for samples of these lengths (tokens), at `element` bytes a number of q, k and v; attention is fp32."""
        total = 0
        for length in lengths:
            tokens = min(length, self.tokens or length)
            width = tokens * self.geometry.head_dim
            per = {"q": element * len(self.heads) * width, "attention": 4 * len(self.heads) * tokens * tokens}
            per["k"] = per["v"] = element * len(self.kv_heads) * width
            total += sum(per[kind] for kind in self.kinds) * len(self.layers)
        return total

    def check(self, lengths: list[int], element: int = 4) -> int:
        """Bytes needed; raises InputError when the disk cannot hold them."""
        needed = self.nbytes(lengths, element)
        free = shutil.disk_usage(self.folder.parent).free
        if needed > free:
            raise InputError(
                "the disk cannot hold the raw tensors",
                got=f"{free / 1e9:.1f} GB free",
                expected=f"{needed / 1e9:.1f} GB",
                remedy="choose fewer --layers, --heads or --raw-tokens",
            )
        return needed

    def clear(self) -> None:
        """Remove what an earlier run of the same name wrote."""
        for path in self.folder.glob("sample-*/layer-*.safetensors"):
            path.unlink()
        for path in self.folder.glob("sample-*"):
            path.rmdir()

    def states(self, view: States) -> None:
        """Write one layer of one sample."""
        number = self.samples.setdefault(id(view.sample), len(self.samples))
        if view.layer not in self.layers:
            return
        end = min(view.q.shape[1], self.tokens or view.q.shape[1])
        tensors = {}
        for kind in self.kinds:
            if kind == "attention":
                tensors[kind] = torch.stack([self._attention(view, head, end) for head in self.heads])
            else:
                heads = self.heads if kind == "q" else self.kv_heads
                tensors[kind] = getattr(view, kind)[heads, :end].contiguous()
        target = self.folder / f"sample-{number:04}" / f"layer-{view.layer:03}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target)

    def _attention(self, view: States, head: int, end: int) -> torch.Tensor:
        q, k = view.q[None, [head], :end].float(), view.k[None, [head // self.geometry.group], :end].float()
        found = logits(q, k, scale=view.scale, softcap=view.softcap)[0, 0]
        hidden = torch.ones(end, end, dtype=torch.bool, device=found.device).triu(1)
        window = self.geometry.windows[view.layer]
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        found = found.masked_fill(hidden, float("-inf"))
        if view.sink_logits is not None:  # its share of the softmax is not written
            sink = view.sink_logits[head].float().expand(end, 1)
            return torch.softmax(torch.cat([found, sink], dim=-1), -1)[:, :-1]
        return torch.softmax(found, -1)


def span(text: str | None, count: int, what: str) -> list[int]:
    """ "0,3-5" → [0, 3, 4, 5]; None → all of `count`."""
    if not text:
        return list(range(count))
    try:
        chosen: list[int] = []
        for part in text.split(","):
            low, dash, high = part.partition("-")
            chosen += range(int(low), int(high if dash else low) + 1)
    except ValueError as error:
        raise InputError(f"cannot read {what}", got=text, expected="like 0,3-5") from error
    if not chosen or max(chosen) >= count or min(chosen) < 0:
        raise InputError(f"{what} out of range", got=text, expected=f"numbers from 0 to {count - 1}")
    return sorted(set(chosen))
