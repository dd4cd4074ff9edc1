"""One forward pass over samples side by side, each observed by its own listeners, layer by layer.

A layer's queries, keys, values and attention exist only while that layer runs. What nobody listens to is not computed.
"""

from __future__ import annotations

from typing import Any

import torch

from kvtool.dense import plain
from kvtool.model import Model
from kvtool.observing.stream import stream_hooks
from kvtool.observing.watch import Watch
from kvtool.packing import Packed, Row, run
from kvtool.rotary import Table
from kvtool.serving import Attention
from kvtool.statistics._base import Rows, States, Stream
from kvtool.statistics._weights import weights
from kvtool_kernels.attention_statistics.reference import Summary
from kvtool_kernels.ops import attention_statistics


def forward(model: Model, watches: list[Watch]) -> None:
    """Run the samples of `watches`, which listen to the same statistics, through the model."""
    tables: dict[Any, Table | None] = {}
    row = Row([watch.sample.tokens[None].to(model.device) for watch in watches], [0] * len(watches))
    layers = [
        Packed(row, [_Observer(index, model, watch, tables) for watch in watches])
        for index in range(model.geometry.layers)
    ]

    def tell(what: str, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        for watch, mine, mine_after in zip(watches, row.cut(before), row.cut(after), strict=True):
            watch.all(what, Stream(index, mine[0], mine_after[0]))

    asked = watches[0].wants("attended") or watches[0].wants("stream")
    hooks = stream_hooks(model, tell) if asked else []
    try:
        run(model.network.base_model, row, layers)
    finally:
        for hook in hooks:
            hook.remove()


class _Observer:
    """One sample in one layer of the observed forward pass."""

    def __init__(self, index: int, model: Model, watch: Watch, tables: dict[Any, Table | None]):
        self.index, self.model, self.sample, self.watch, self.tables = index, model, watch.sample, watch, tables

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        weighs = self.watch.weight != "uniform" and self.watch.wants("states")
        summary = self._rows(q, k, v, call) if self.watch.wants("rows") or weighs else None
        if self.watch.wants("states"):
            rotary = self.model.rotary(self.index)
            kind = (rotary.kind, q.shape[2])
            if kind not in self.tables:
                self.tables[kind] = rotary.table(torch.arange(q.shape[2], device=q.device), at_once=True)
            table = self.tables[kind]
            self.watch.all(
                "states",
                States(
                    self.index, q[0], k[0], v[0], call.scale, call.softcap, call.sink_logits, rotary, table,
                    self.sample, None if summary is None else weights(self.watch.weight, summary.columns.sum((0, 1))),
                ),
            )  # fmt: skip
        return plain(q, k, v, call) if summary is None else summary.out[None]

    def _rows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> Summary:
        """Attention with its sums, which are gone once the listeners have seen them."""
        first = (self.sample.period or 0) + len(self.sample.tokens) % (self.sample.period or 1)
        with self.watch.clock("shared: attention"):
            summary: Summary = attention_statistics(
                q[0], k[0], v[0], scale=call.scale, cells=self.watch.cells(), first=first, window=call.window,
                softcap=call.softcap, sink_logits=call.sink_logits,
            )  # fmt: skip
        self.watch.all("rows", Rows(self.index, summary, first, self.sample))
        return summary
