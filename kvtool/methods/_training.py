"""What methods that train beside a frozen model share: prompts, what attention is given there, and AdamW with a state
that a checkpoint can hold.

A prompt's context, what stands before its `question`, is what a cache may compress; all that follows looks at it. Every
prompt is of the calibration half of the default text. It knows no method.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers.cache_utils import Cache

from kvtool import plan
from kvtool.corpus.base import Sample
from kvtool.corpus.haystack import Haystack
from kvtool.corpus.needle import needle
from kvtool.corpus.passkey import multi_passkey, passkey
from kvtool.corpus.text import text
from kvtool.corpus.twohop import twohop
from kvtool.dense import plain
from kvtool.errors import InputError, unknown
from kvtool.methods._base import Context
from kvtool.model import Geometry, Model
from kvtool.serving import Attention, Layer
from kvtool.statistics._base import States

HALF = "calibration"
CONTEXT = 0.75  # of a stretch of plain text: the rest continues it
EVERY = 10  # steps between two checkpoints
Tensors = dict[str, torch.Tensor]


def _passkey(model: Model, length: int, count: int, seed: int) -> Sequence[Sample]:
    depths = torch.linspace(0.05, 0.95, count).tolist()
    return passkey(model, lengths=(length,), depths=depths, keys=1, seed=seed, haystack=HALF).samples


def _passkeys(model: Model, length: int, count: int, seed: int) -> Sequence[Sample]:
    straw = Haystack(model, HALF)
    return [
        multi_passkey(model, length=length, passkeys=3, seed=seed, index=index, haystack=straw)
        for index in range(count)
    ]


def _needle(model: Model, length: int, count: int, seed: int) -> Sequence[Sample]:
    depths = torch.linspace(0.05, 0.95, count).tolist()
    return needle(model, lengths=(length,), depths=depths, samples=1, seed=seed, haystack=HALF).samples


def _twohop(model: Model, length: int, count: int, seed: int) -> Sequence[Sample]:
    return twohop(model, lengths=(length,), samples=count, seed=seed, haystack=HALF).samples


def _text(model: Model, length: int, count: int, seed: int) -> Sequence[Sample]:
    made = text(model, tokens=length, samples=count, seed=seed, half=HALF).samples
    return [replace(sample, question=round(CONTEXT * length)) for sample in made]


KINDS: dict[str, Callable[[Model, int, int, int], Sequence[Sample]]] = {
    "passkey": _passkey, "passkeys": _passkeys, "needle": _needle, "two-hop": _twohop, "text": _text,
}  # fmt: skip


def prompts(model: Model, kinds: Sequence[str], lengths: Sequence[int], count: int, seed: int) -> list[Sample]:
    """`count` prompts per kind and length (tokens), shuffled; an answer, which comes on top, is joined to `tokens`.

    Raises InputError for an unknown kind.
    """
    made = []
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of prompt", kind, KINDS)
        for length in lengths:
            made += list(KINDS[kind](model, length, count, seed))
    random.Random(seed).shuffle(made)
    return [
        sample if sample.answer is None else replace(sample, tokens=torch.cat([sample.tokens, sample.answer]))
        for sample in made
    ]


def whole(geometry: Geometry) -> list[int]:
    """Layers without a sliding window of their own. Raises InputError when there is none."""
    found = [layer for layer, window in enumerate(geometry.windows) if window is None]
    if not found:
        raise InputError("every layer of this model has a sliding window", expected="layers that keep everything")
    return found


class _Recorder(Layer):
    """The model's own attention; keeps what it was given."""

    seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Attention] | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        self.seen = (q[0], k[0], v[0], call)
        return plain(q, k, v, call)

    def get_seq_length(self) -> int:
        return 0


def states(model: Model, sample: Sample) -> list[States]:
    """What the attention of every layer is given in one pass over the sample."""
    layers = [_Recorder() for _ in range(model.geometry.layers)]
    ids = sample.tokens[None].to(model.device)
    with model.served(), torch.no_grad():
        model.network.base_model(input_ids=ids, past_key_values=Cache(layers=list(layers)))
    found = []
    for index, layer in enumerate(layers):
        assert layer.seen is not None
        q, k, v, call = layer.seen
        rotary = model.rotary(index)
        table = rotary.table(torch.arange(q.shape[1], device=q.device), at_once=True)
        found.append(States(index, q, k, v, call.scale, call.softcap, call.sink_logits, rotary, table, sample))
    return found


class Trainer:
    """AdamW over named tensors, begun anew or where an interrupted calibration stopped. `losses`: one a step."""

    def __init__(self, context: Context, start: Tensors, steps: int, lr: dict[str, float], clip: float):
        """lr: of each tensor, at its height; clip: the largest gradient of any element."""
        self.context, self.steps, self.lr, self.clip = context, steps, lr, clip
        kept = context.resume or start
        device = None if context.model is None else context.model.device
        self.tensors = {name: kept[name].to(device, copy=True).requires_grad_(True) for name in start}
        groups = [{"params": [tensor], "lr": lr[name]} for name, tensor in self.tensors.items()]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.losses: list[float] = kept["loss"].tolist() if context.resume else []
        for name, tensor in self.tensors.items():
            if context.resume:
                moments = {moment: kept[f"{name}.{moment}"].to(device, copy=True) for moment in MOMENTS}
                self.optimiser.state[tensor] = {"step": torch.tensor(float(len(self.losses))), **moments}

    def step(self, shown: float) -> None:
        """One step down the gradients that are there, which are gone afterwards; `shown`: the loss."""
        done = len(self.losses)
        for group, lr in zip(self.optimiser.param_groups, self.lr.values(), strict=True):
            group["lr"] = lr * ramp(done, self.steps)
        torch.nn.utils.clip_grad_value_(self.tensors.values(), self.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.losses.append(shown)
        self.context.progress(done + 1, self.steps, f"loss {shown:.4f}")
        if (done + 1) % EVERY == 0:
            self.context.checkpoint(self._state())

    def _state(self) -> Tensors:
        held = {name: tensor.detach().cpu() for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            held |= {f"{name}.{moment}": self.optimiser.state[tensor][moment].cpu() for moment in MOMENTS}
        return held | {"loss": torch.tensor(self.losses, dtype=torch.float64)}

    def done(self) -> tuple[Tensors, torch.Tensor]:
        """The trained tensors, and the losses fp32 [steps]."""
        return {name: tensor.detach().cpu() for name, tensor in self.tensors.items()}, torch.tensor(self.losses)


def placed(context: Context, layers: list[int], tensors: Tensors) -> Tensors:
    """What was trained for some layers [N,...], as bf16 tables of all layers [L,...]; 0 in the others."""
    tables = {}
    for name, tensor in tensors.items():
        tables[name] = torch.zeros(context.geometry.layers, *tensor.shape[1:], dtype=torch.bfloat16)
        tables[name][layers] = tensor.bfloat16()
    return tables


MOMENTS = ("exp_avg", "exp_avg_sq")


def ramp(step: int, steps: int) -> float:
    """Learning rate factor: up over the first tenth, down over the second half."""
    return min(1.0, (step + 1) / max(1, steps // 10), (steps - step) / max(1, steps - steps // 2))


def given(context: Context, path: str, names: Sequence[str]) -> tuple[Tensors, torch.Tensor]:
    """What an earlier plan's selection was trained to, these tables, and its losses.

    Raises InputError when the plan has none, or is of another model.
    """
    found = plan.read(path)
    select = None if found.keep is None else found.keep.select
    tables = {} if select is None else {name: select.tables[name] for name in names if name in select.tables}
    if len(tables) < len(names):
        raise InputError("the plan was not trained by this method", got=path, expected="one with " + ", ".join(names))
    if context.model is not None:
        found.check(context.model.fingerprint)
    return tables, found.evidence.get("loss", torch.zeros(0))
