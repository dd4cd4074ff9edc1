"""Extreme tokens: attention sinks, value-state drains and residual peaks, which are one phenomenon.

    sink     mean over rows i > 0 of A[i, 0], per query head;
             `sink_heads` counts (sequence, head) pairs above 0.3 (threshold from memory)
    value    ‖W_O^h v(0)‖ and its mean over the other tokens: the value drain is their ratio
    gap      mean over rows of logit(q, k_0) − mean_{0<j≤i} logit(q, k_j); windows and soft caps are left out
    stream   ‖x(0)‖ (summed over sequences) and the largest other ‖x(t)‖ before each layer and after the last;
             `massive` counts tokens whose largest |x| exceeds 100 times the layer's mean |x|

Active-dormant heads, arXiv 2410.13835.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import SLICE, Rows, States, Statistic, Stream

SINK = 0.3
MASSIVE = 100.0


class Extremes(Statistic):
    def zero(self) -> None:
        layers, heads = self.geometry.layers, self.geometry.query_heads
        self.add("sink", layers, heads)
        self.add("sink_heads", layers, heads)
        self.add("value_first", layers, heads)
        self.add("value_rest", layers, heads)
        self.add("gap", layers, heads)
        self.add("stream_first", layers + 1)
        self.add("stream_rest", layers + 1, rule="max")
        self.add("massive", layers + 1)
        self.add("sequences", 1)
        self.add("tokens", 1)

    def rows(self, view: Rows) -> None:
        columns = view.summary.columns[:, :, 0].sum(1).double()
        tokens = view.summary.columns.shape[-1]
        mass = (columns - view.summary.corner) / max(1, tokens - 1)
        self["sink"][view.layer] += mass
        self["sink_heads"][view.layer] += mass > SINK

    def states(self, view: States) -> None:
        layer, group, metric = view.layer, self.geometry.group, self._output(view.layer)
        for head, queries in enumerate(view.q.split(group)):
            mine = slice(head * group, (head + 1) * group)
            values, keys = view.v[head].float(), view.k[head].float()
            norm = torch.linalg.vecdot(values @ metric[mine], values).clamp_min_(0).sqrt_()
            self["value_first"][layer, mine] += norm[:, 0]
            self["value_rest"][layer, mine] += norm[:, 1:].mean(-1) if len(keys) > 1 else norm[:, 0]
            if len(keys) > 1:
                others = keys[1:].cumsum(0).div_(torch.arange(1, len(keys))[:, None])
                contrast = others.neg_().add_(keys[0]) * (view.scale / len(others))
                self["gap"][layer, mine] += torch.stack([(query[1:] * contrast).sum() for query in queries])
        if layer == 0:
            self["sequences"] += 1
            self["tokens"] += view.k.shape[1]

    def stream(self, view: Stream) -> None:
        self._residual(view.layer, view.before)
        if view.layer == self.geometry.layers - 1:
            self._residual(view.layer + 1, view.after)

    def _residual(self, index: int, x: torch.Tensor) -> None:
        parts = [_sizes(part.float().abs()) for part in x.split(SLICE)]
        norm, largest, mean = (torch.cat(part) for part in zip(*parts, strict=True))
        self["stream_first"][index] += norm[0]
        if len(norm) > 1:
            self["stream_rest"][index] = torch.maximum(self["stream_rest"][index], norm[1:].max().double())
        self["massive"][index] += (largest > MASSIVE * mean.mean()).sum()

    def _output(self, layer: int) -> torch.Tensor:
        """W_Oᵀ W_O per query head, [H,D,D]: ‖W_O^h v‖² = vᵀ (W_Oᵀ W_O) v."""
        assert self.model is not None
        weight = self.model.output_projection(layer).float()
        per_head = weight.unflatten(1, (self.geometry.query_heads, self.geometry.head_dim)).transpose(0, 1)
        return per_head.transpose(1, 2) @ per_head


def _sizes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """|x| [T,hidden] → norm, maximum and mean of each token, [T] each."""
    return x.norm(dim=-1), x.amax(-1), x.mean(-1)
