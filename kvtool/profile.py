"""The streaming pass: run samples through a model and let statistics observe.

Each sample is one forward pass; a layer's queries, keys, values and attention exist only while that layer runs.
What no requested statistic observes is not computed. It knows no statistic by name.
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
from kvtool.raw import Raw
from kvtool.rotary import Table
from kvtool.serving import Attention, Layer
from kvtool.statistics._base import Copying, Rows, States, Statistic, Stream
from kvtool.statistics._weights import weights
from kvtool.trace import Trace, statistic
from kvtool_kernels.attention_statistics.reference import Summary
from kvtool_kernels.ops import attend, attention_statistics

DECODE = 50  # tokens generated for a prompt with an answer, at most
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
        for sample in corpus.samples:
            key = digest(sample.tokens)
            if key in done:
                continue
            fresh = {name: type(stat)(model, model.geometry) for name, stat in listeners.items()}
            _observe(model, sample, fresh, costs, raw if kind == "text" else None, trace.weight)
            with _uninterrupted():  # a sample is in the trace as a whole or not at all
                for name, stat in listeners.items():
                    stat.merge(fresh[name])
                done.append(key)
            progress(kind, sample)
    return costs


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


def _observe(
    model: Model, sample: Sample, listeners: dict[str, Statistic], costs: dict[str, float], raw: Raw | None, weight: str
) -> None:
    watch = _Watch(listeners, costs, raw, weight)
    with model.device:  # what statistics create lies where the model is
        watch.all("begin", sample)
    with model.served(), torch.no_grad(), model.device:
        answer = _copying(model, sample, watch) if watch.wants("step") else None
        if any(watch.wants(what) for what in ("states", "rows", "attended", "stream")):
            _forward(model, sample, watch)
    watch.all("end", sample, answer)


class _Watch:
    """The listeners of one sample, with a clock on each."""

    def __init__(self, listeners: dict[str, Statistic], costs: dict[str, float], raw: Raw | None, weight: str):
        self.listeners, self.costs, self.raw, self.weight = listeners, costs, raw, weight

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


class _Observer(Layer):
    """One layer of the observed forward pass."""

    def __init__(self, index: int, model: Model, sample: Sample, watch: _Watch, tables: dict[Any, Table | None]):
        super().__init__()
        self.index, self.model, self.sample, self.watch, self.tables = index, model, sample, watch, tables

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        weighs = self.watch.weight != "uniform" and self.watch.wants("states")
        summary = self._rows(q, k, v, call) if self.watch.wants("rows") or weighs else None
        if self.watch.wants("states"):
            rotary = self.model.rotary(self.index)
            if rotary.kind not in self.tables:
                self.tables[rotary.kind] = rotary.table(torch.arange(q.shape[2], device=q.device))
            table = self.tables[rotary.kind]
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
        with self.watch.clock("(attention)"):
            summary: Summary = attention_statistics(
                q[0], k[0], v[0], scale=call.scale, cells=self.watch.cells(), first=first, window=call.window,
                softcap=call.softcap, sink_logits=call.sink_logits,
            )  # fmt: skip
        self.watch.all("rows", Rows(self.index, summary, first, self.sample))
        return summary

    def get_seq_length(self) -> int:
        return 0


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


def _forward(model: Model, sample: Sample, watch: _Watch) -> None:
    tables: dict[Any, Table | None] = {}
    layers: list[Any] = [_Observer(index, model, sample, watch, tables) for index in range(model.geometry.layers)]
    hooks = _stream_hooks(model, watch) if watch.wants("attended") or watch.wants("stream") else []
    try:
        model.network.base_model(input_ids=sample.tokens[None].to(model.device), past_key_values=Cache(layers=layers))
    finally:
        for hook in hooks:
            hook.remove()


def _stream_hooks(model: Model, watch: _Watch) -> list[Any]:
    """Hooks that hand the residual stream around each layer to the listeners."""
    seen: dict[int, torch.Tensor] = {}
    hooks = []
    for index, (layer, attention) in enumerate(zip(model.decoder_layers, model.attention_modules, strict=True)):

        def before(module, args, kwargs, index=index):
            seen[index] = args[0] if args else kwargs["hidden_states"]

        def middle(module, args, output, index=index, layer=layer):
            out = output[0] if isinstance(output, tuple) else output
            if hasattr(layer, "pre_feedforward_layernorm"):  # sandwich norms: the residual adds the normed output
                out = layer.post_attention_layernorm(out)
            watch.all("attended", Stream(index, seen[index][0], (seen[index] + out)[0]))

        def after(module, args, output, index=index):
            out = output[0] if isinstance(output, tuple) else output
            watch.all("stream", Stream(index, seen.pop(index)[0], out[0]))

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
        logits = (q[0, :, 0].unflatten(0, (k.shape[1], -1)).float() @ k[0].float().transpose(1, 2)).flatten(
            0, 1
        ) * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        if call.window is not None:
            logits[:, : max(0, k.shape[2] - call.window)] = float("-inf")
        sink = (
            call.sink_logits.float()[:, None]
            if call.sink_logits is not None
            else logits.new_full((len(logits), 1), float("-inf"))
        )
        self.row = torch.softmax(torch.cat([logits, sink], dim=1), dim=1)[:, :-1]
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
