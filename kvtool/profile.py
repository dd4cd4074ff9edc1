"""The streaming pass: run samples through a model and let statistics observe.

Short samples share a forward pass (see `packing.py`), in which each is alone with its own listeners; a layer's queries,
keys, values and attention exist only while that layer runs. What no requested statistic observes is not computed. It
knows no statistic by name.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import torch

from kvtool import registry
from kvtool.corpus.base import Corpus, Sample
from kvtool.files import digest
from kvtool.model import Model
from kvtool.observing.copying import copying
from kvtool.observing.forward import forward
from kvtool.observing.watch import Watch
from kvtool.packing import bins
from kvtool.raw import Raw
from kvtool.statistics._base import Statistic
from kvtool.trace import Trace, statistic

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
                Watch(
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


def _observe(model: Model, watches: list[Watch]) -> None:
    with model.device:  # what statistics create lies where the model is
        for watch in watches:
            watch.all("begin", watch.sample)
    with model.served(), torch.no_grad(), model.device:
        answers = [copying(model, watch.sample, watch) if watch.wants("step") else None for watch in watches]
        if any(watches[0].wants(what) for what in ("states", "rows", "attended", "stream")):
            forward(model, watches)
    for watch, answer in zip(watches, answers, strict=True):
        watch.all("end", watch.sample, answer)
