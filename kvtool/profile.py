"""The streaming pass: run samples through a model and let statistics observe.

Short samples share a forward pass (see `packing.py`), in which each is alone with its own listeners; a layer's queries,
keys, values and attention exist only while that layer runs. What no requested statistic observes is not computed. It
knows no statistic by name.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvtool import registry
from kvtool.corpus.base import Corpus, Sample
from kvtool.files import digest
from kvtool.model import Model
from kvtool.packing import Packed, Row, bins, run
from kvtool.raw import Raw
from kvtool.rotary import Table
from kvtool.serving import Attention, Layer
from kvtool.statistics._base import Copying, Rows, States, Statistic, Stream
from kvtool.statistics._weights import weights
from kvtool.trace import Trace, statistic
from kvtool_kernels.attend.reference import logits
from kvtool_kernels.attention_statistics.reference import Summary
from kvtool_kernels.ops import attend, attention_statistics

DECODE = 50  # tokens generated for a prompt with an answer, at most
ROW = 2048  # tokens of short samples that share a forward pass
HELD = 2**28  # bytes that the accumulators of these samples have, as each has its own until the pass is over
Progress = Callable[[str, Sample], None]


def default_statistics() -> list[str]:
    """Names of the statistics that a plain profile takes."""
    return [name for name in registry.names("statistics") if statistic(name).default]


def profile(
    model: Model,
    trace: Trace,
    corpora: dict[str, Corpus],
    *,
    progress: Progress = lambda kind, sample: None,
    raw: Raw | None = None,
) -> dict[str, float]:
    """Observe every sample of `corpora` (by kind) that `trace` has not seen, in place; seconds spent per statistic.

    `raw` writes the tensors of the text samples to disk besides.

    A KeyboardInterrupt leaves the trace valid: the sample under way is not in it.
    """
    costs: dict[str, float] = {}
    for kind, corpus in corpora.items():
        listeners = {name: stat for name, stat in trace.statistics.items() if stat.corpus == kind}
        if not listeners and not (raw and kind == "text"):
            continue
        done = trace.done.setdefault(kind, [])
        if corpus.provenance["hash"] not in [part["hash"] for part in trace.corpora.setdefault(kind, [])]:
            trace.corpora[kind].append(corpus.provenance)
        waiting = {digest(sample.tokens): sample for sample in corpus.samples}
        for row in _rows(model, {key: sample for key, sample in waiting.items() if key not in done}, listeners):
            watches = [
                _Watch(
                    sample, {name: type(stat)(model, model.geometry) for name, stat in listeners.items()}, costs,
                    raw if kind == "text" else None, trace.weight,
                )
                for sample in row.values()
            ]  # fmt: skip
            _observe(model, watches)
            for key, watch in zip(row, watches, strict=True):
                with _uninterrupted():  # a sample is in the trace as a whole or not at all
                    for name, stat in listeners.items():
                        stat.merge(watch.listeners[name])
                    done.append(key)
                progress(kind, watch.sample)
    return costs


def _rows(model: Model, samples: dict[str, Sample], listeners: dict[str, Statistic]) -> Iterator[dict[str, Sample]]:
    """Samples that share a pass: as many as ROW and HELD allow, and none for which RoPE would turn the others
    otherwise."""
    steady = min((rotary.steady or ROW for rotary in map(model.rotary, range(model.geometry.layers))), default=ROW)
    lengths = [length if (length := len(sample.tokens)) <= steady else ROW for sample in samples.values()]
    held = sum(tensor.nbytes for stat in listeners.values() for tensor in stat.state.values())
    keys = list(samples)
    for row in bins(lengths, ROW, max(1, HELD // max(held, 1))):
        yield {keys[index]: samples[keys[index]] for index in row}


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C within the block takes effect at its end (signals reach the main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[object] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt


def _observe(model: Model, watches: list[_Watch]) -> None:
    with model.device:  # what statistics create lies where the model is
        for watch in watches:
            watch.all("begin", watch.sample)
    with model.served(), torch.no_grad(), model.device:
        answers = [_copying(model, watch.sample, watch) if watch.wants("step") else None for watch in watches]
        if any(watches[0].wants(what) for what in ("states", "rows", "attended", "stream")):
            _forward(model, watches)
    for watch, answer in zip(watches, answers, strict=True):
        watch.all("end", watch.sample, answer)


class _Watch:
    """The listeners of one sample, with a clock on each."""

    def __init__(
        self, sample: Sample, listeners: dict[str, Statistic], costs: dict[str, float], raw: Raw | None, weight: str
    ):
        self.sample, self.listeners, self.costs, self.raw, self.weight = sample, listeners, costs, raw, weight

    def wants(self, what: str) -> bool:
        return (what == "states" and self.raw is not None) or any(
            stat.observes(what) for stat in self.listeners.values()
        )

    def cells(self) -> int:
        return max((getattr(stat, "cells", 1) for stat in self.listeners.values()), default=1)

    def all(self, what: str, *views: Any) -> None:
        for name, stat in self.listeners.items():
            if stat.observes(what):
                with self.clock(name):
                    getattr(stat, what)(*views)
        if what == "states" and self.raw is not None:
            with self.clock("(raw)"):
                self.raw.states(*views)

    def clock(self, name: str) -> _Clock:
        return _Clock(self.costs, name)


class _Clock:
    def __init__(self, costs: dict[str, float], name: str):
        self.costs, self.name = costs, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.costs[self.name] = self.costs.get(self.name, 0.0) + time.perf_counter() - self.start


class _Observer:
    """One sample in one layer of the observed forward pass."""

    def __init__(self, index: int, model: Model, watch: _Watch, tables: dict[Any, Table | None]):
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


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention, kernel: Callable[..., Any] = attend
) -> torch.Tensor:
    """Causal attention of whole sequences [1,H,T,D] as the model means it: sliding window, soft cap, sink logits.
    `kernel`: the reference where gradients must flow."""
    bias = None
    if call.window is not None and call.window < k.shape[2]:
        row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        hidden = (column <= row - call.window).to(q.device)
        bias = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, float("-inf"))[None, None]
    out, lse = kernel(q, k, v, scale=call.scale, causal=True, bias=bias, softcap=call.softcap)
    if call.sink_logits is not None:
        out = (out * torch.sigmoid(lse - call.sink_logits.float()[None, :, None])[..., None]).to(q.dtype)
    return out


def _forward(model: Model, watches: list[_Watch]) -> None:
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


def stream_hooks(model: Model, tell: Callable[[str, int, torch.Tensor, torch.Tensor], None]) -> list[Any]:
    """Hooks that tell of each layer's residual stream, [B,T,hidden], before and after its attention ("attended") and
    the whole layer ("stream")."""
    seen: dict[int, torch.Tensor] = {}
    hooks = []

    for index, (layer, attention) in enumerate(zip(model.decoder_layers, model.attention_modules, strict=True)):

        def before(module, args, kwargs, index=index):
            seen[index] = args[0] if args else kwargs["hidden_states"]

        def middle(module, args, output, index=index, layer=layer):
            out = output[0] if isinstance(output, tuple) else output
            if hasattr(layer, "pre_feedforward_layernorm"):  # sandwich norms: the residual adds the normed output
                out = layer.post_attention_layernorm(out)
            tell("attended", index, seen[index], seen[index] + out)

        def after(module, args, output, index=index):
            out = output[0] if isinstance(output, tuple) else output
            tell("stream", index, seen.pop(index), out)

        hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            attention.register_forward_hook(middle),
            layer.register_forward_hook(after),
        ]
    return hooks


class _Copier(Layer):
    """Full cache of one sequence that keeps the last row's attention [H,S] of the latest one-token step."""

    def __init__(self) -> None:
        super().__init__()
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.row = torch.empty(0)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        if self.held is not None:
            k, v = torch.cat([self.held[0], k], dim=2), torch.cat([self.held[1], v], dim=2)
        self.held = (k, v)
        if q.shape[2] > 1:
            return plain(q, k, v, call)
        seen = logits(q.float(), k.float(), scale=call.scale, softcap=call.softcap)[0, :, 0]
        if call.window is not None:
            seen[:, : max(0, k.shape[2] - call.window)] = float("-inf")
        sink = (
            call.sink_logits.float()[:, None]
            if call.sink_logits is not None
            else seen.new_full((len(seen), 1), float("-inf"))
        )
        self.row = torch.softmax(torch.cat([seen, sink], dim=1), dim=1)[:, :-1]
        out = self.row.unflatten(0, (k.shape[1], -1)) @ v[0].float()
        return out.flatten(0, 1)[None, :, None].to(q.dtype)

    def get_seq_length(self) -> int:
        return 0 if self.held is None else self.held[0].shape[2]


def _copying(model: Model, sample: Sample, watch: _Watch) -> torch.Tensor:
    """Greedy decode of the sample's prompt, one observation a step; stops at a stop token or after the answer's
    length + 2."""
    layers: list[Any] = [_Copier() for _ in range(model.geometry.layers)]
    cache = Cache(layers=layers)
    tokens = sample.tokens[None].to(model.device)
    if tokens.shape[1] > 1:
        model.network.base_model(input_ids=tokens[:, :-1], past_key_values=cache)
    token, answer = tokens[:, -1:], []
    limit = DECODE if sample.answer is None else min(DECODE, len(sample.answer) + 2)
    for _ in range(limit):
        logits = model.network(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        attention = torch.stack([layer.row for layer in layers])
        watch.all("step", Copying(attention, int(token), tokens[0]))
        answer.append(int(token))
        if int(token) in stop_tokens(model):
            break
    return torch.tensor(answer)


def stop_tokens(model: Model) -> set[int]:
    """Ids that end a generation."""
    stop = getattr(model.network.generation_config, "eos_token_id", None)
    return set() if stop is None else set(stop if isinstance(stop, Iterable) else [stop])
