"""`SegmentCache`: the transformers cache that executes a plan.

    with model.served():
        model.network.generate(ids, past_key_values=SegmentCache(model, plan))

Each layer holds lanes (see `lane.py`); a query's attention is computed lane by lane, since heads are independent,
and segment by segment inside a lane, by merging. It knows plans, not methods.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers.cache_utils import Cache

from kvtool.cache.lane import Full, Lane, Step, Window
from kvtool.errors import InputError
from kvtool.model import Attention, Layer, Model
from kvtool.plan import EVERYTHING, Keep, Plan

Protocol = Literal["official", "strict"]


class SegmentLayer(Layer):
    """One layer's lanes. `columns` counts tokens fed, padding included."""

    def __init__(self, lanes: list[Lane], *, strict: bool):
        super().__init__()
        self.lanes, self.strict, self.columns = lanes, strict, 0

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        padding = None
        if call.padding is not None:
            seen = call.padding.bool()
            if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
                raise InputError("the attention mask hides tokens elsewhere than on the left", remedy="pad on the left")
            padding = (~seen).sum(1)
        step = Step(self.columns, call.scale, call.softcap, padding, self.strict)
        self.columns += k.shape[2]
        if len(self.lanes) == 1:
            out, lse = self.lanes[0].step(q, k, v, step)
        else:
            out, lse = self._by_lane(q, k, v, step)
        if call.sink_logits is not None:  # a learned logit with value 0 takes part in the softmax
            share = torch.sigmoid(lse - call.sink_logits.float()[None, :, None])
            out = (out * share[..., None]).to(q.dtype)
        return out

    def _by_lane(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step):
        batch, heads, tokens, width = q.shape
        kv_heads = k.shape[1]
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, tokens, width)
        out = torch.empty_like(grouped)
        lse = torch.empty(grouped.shape[:-1], device=q.device)
        for lane in self.lanes:
            part, part_lse = lane.step(grouped[:, lane.heads].flatten(1, 2), k[:, lane.heads], v[:, lane.heads], step)
            shape = (batch, len(lane.heads), heads // kv_heads, tokens)
            out[:, lane.heads], lse[:, lane.heads] = part.reshape(*shape, width), part_lse.reshape(shape)
        return out.flatten(1, 2), lse.flatten(1, 2)

    def get_seq_length(self) -> int:
        return self.columns

    def adopt(self, other: SegmentLayer) -> None:
        """Take over what `other`, one lane of all heads without padding, holds, as if it had been fed here."""
        k, v, first = other.lanes[0].recall(other.columns)
        for lane in self.lanes:
            lane.absorb(k[:, lane.heads], v[:, lane.heads], Step(first, 1.0, None, None, self.strict))
        self.columns = other.columns

    def reset(self) -> None:
        self.columns = 0
        for lane in self.lanes:
            lane.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for lane in self.lanes:
            lane.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Overwritten entries cannot come back."""
        raise InputError(
            "a segment cache cannot be rolled back", remedy="assisted generation and prompt lookup need the full cache"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for lane in self.lanes:
            lane.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for lane in self.lanes:
            batch = next(lane.buffers()).shape[0]
            lane.reorder(torch.arange(batch).repeat_interleave(repeats))


class SegmentCache(Cache):
    """A fresh cache for one batch.

    plan None is the full cache. `protocol` says what windowed heads see in prefill: what they hold and the whole
    chunk ("official", as DuoAttention is published: a prompt fed at once is seen whole) or their window only
    ("strict", in which chunked prefill, prefill at once and decode are all the same function). Decode is windowed
    either way. `prompt_length` (tokens) resolves windows that are a share of the prompt; raises InputError if a
    plan needs it and it is missing.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan | None = None,
        *,
        protocol: Protocol = "official",
        prompt_length: int | None = None,
    ):
        if protocol not in ("official", "strict"):
            raise InputError("unknown protocol", got=protocol, expected="official or strict")
        self.protocol: Protocol = protocol
        geometry = model.geometry
        keep = plan.keep if plan is not None else None
        if plan is not None:
            plan.check(model.fingerprint)
        if keep is not None and keep.recent_ratio and prompt_length is None:
            raise InputError("this plan's window is a share of the prompt", remedy="pass prompt_length=<tokens>")
        layers = []
        for index in range(geometry.layers):
            window = geometry.windows[index]
            lanes = _lanes(model, keep, index, window, prompt_length or 0)
            layers.append(SegmentLayer(lanes, strict=protocol == "strict"))
        self.segments = layers
        super().__init__(layers=list(layers))

    def adopt(self, full: SegmentCache) -> None:
        """Start from a prompt (unpadded) that the full cache `full` was fed at once.

        The result is the same as feeding this cache, as long as prefill is dense: under the official protocol.
        """
        if self.protocol != "official":
            raise InputError("a strict cache must see its own prefill")
        for mine, theirs in zip(self.segments, full.segments, strict=True):
            mine.adopt(theirs)

    @property
    def nbytes(self) -> int:
        """Bytes held: the sum over every buffer of every lane, slack included."""
        return sum(buffer.nbytes for lane in self._all() for buffer in lane.buffers())

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values that one decode step reads."""
        total = 0
        for layer in self.segments:
            for lane in layer.lanes:
                buffers = list(lane.buffers())
                if buffers:
                    batch, kv_heads, _, width = buffers[0].shape
                    total += 2 * batch * kv_heads * width * buffers[0].element_size() * lane.entries(layer.columns)
        return total

    @property
    def moved_bytes(self) -> int:
        """Bytes brought from slower memory so far: everything is resident here."""
        return 0

    def entries(self) -> torch.Tensor:
        """Entries that a decode step reads, int64 [L,K]."""
        rows = []
        for layer in self.segments:
            row = {head: lane.entries(layer.columns) for lane in layer.lanes for head in lane.heads}
            rows.append([row[head] for head in sorted(row)])
        return torch.tensor(rows)

    def _all(self):
        return (lane for layer in self.segments for lane in layer.lanes)


def _lanes(model: Model, keep: Keep | None, layer: int, window: int | None, prompt_length: int) -> list[Lane]:
    """KV heads with the same policy share a lane."""
    policies: dict[tuple[int, int, bool], list[int]] = {}
    for head in range(model.geometry.kv_heads):
        policy = (0, EVERYTHING, False)
        if keep is not None and int(keep.recent[layer, head]) != EVERYTHING:
            recent = max(int(keep.recent[layer, head]), round(keep.recent_ratio * prompt_length))
            policy = (int(keep.sink[layer, head]), recent, bool(keep.compensate[layer, head]))
        policies.setdefault(policy, []).append(head)
    lanes: list[Lane] = []
    for (sink, recent, compensate), heads in policies.items():
        if recent == EVERYTHING and window is None:
            lanes.append(Full(heads))
            continue
        assert window is not None or recent != EVERYTHING
        lanes.append(
            Window(
                heads,
                sink=sink,
                recent=window if recent == EVERYTHING and window is not None else recent,
                compensate=compensate,
                reindex=model.rotary(layer) if keep is not None and keep.position == "reindex" else None,
                model_window=window,
            )
        )
    return lanes
