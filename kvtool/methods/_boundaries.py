"""Training of the network that predicts a prompt's boundaries (`cache/read/boundaries/predicted.py`), for `dhsa`.

    label_b = 1 where `labels` of the layer's dense pass has a boundary at b, else 0
    loss = cross-entropy of the logits, boundaries weighed so that both classes count alike

Texts are of the calibration half. The last quarter of them is held out: `precision` and `recall` are of boundaries made
there from the logits as they will be made of a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from kvtool import plan
from kvtool.cache.lane import Step
from kvtool.cache.read.boundaries import _base, labels, predicted
from kvtool.cache.read.prefills._base import Job
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.methods._base import Context
from kvtool.methods._prompts import texts
from kvtool.methods._training import Tensors, Trainer
from kvtool.slots import Prefill
from kvtool.statistics._base import States

if TYPE_CHECKING:
    from kvtool.methods.dhsa import Options

CLIP = 0.5
HELD_OUT = 4  # one text in so many
Example = tuple[torch.Tensor, torch.Tensor]


def train(context: Context, options: Options, layer: int) -> tuple[Tensors, torch.Tensor, dict[str, float]]:
    """(tables fp32, loss of each step fp32 [steps], how the network does on texts held out)."""
    model, pool = context.running, []
    for number, sample in enumerate(texts(context, samples=options.samples, tokens=options.tokens)):
        pool.append(example(_training.states(model, sample)[layer], options))
        context.progress(0, options.steps, f"text {number + 1} of {options.samples}")
    shown, held = pool[: -(len(pool) // HELD_OUT)], pool[-(len(pool) // HELD_OUT) :]
    if not any(bool(label.any()) for _, label in shown):
        raise InputError("no place of the texts is a boundary", got=f"theta {options.theta}", remedy="lower theta")
    start = fresh(context, options)
    trainer = Trainer(context, start, options.steps, lr=dict.fromkeys(start, options.lr), clip=CLIP)
    weight = _weight(shown)
    for step in range(len(trainer.losses), options.steps):
        keys, label = shown[step % len(shown)]
        logits = predicted.logits(keys, trainer.tensors, options.window)
        known = torch.isfinite(logits)
        loss = functional.binary_cross_entropy_with_logits(logits[known], label[known].float(), pos_weight=weight)
        loss.backward()
        trainer.step(float(loss.detach()))
    tables, losses = trainer.done()
    return tables, losses, found(held, tables, options)


def example(seen: States, options: Options) -> Example:
    """Keys of a text before RoPE [1,T,C], and its boundaries bool [1,T]."""
    spec = Prefill(torch.ones(1), window=options.window)
    step = Step(0, seen.scale, seen.softcap)
    q, k = seen.q[None], seen.k[None]
    job = Job(spec, q, k, step, seen.rotary, seen.layer, lambda low, first, near: torch.zeros(1, 1))
    most = options.most * q.shape[2] // options.block
    label = _base.chosen(labels.values(job), options.theta, options.apart, most)
    return seen.k_pre.float().transpose(0, 1).flatten(1)[None], label


def fresh(context: Context, options: Options) -> Tensors:
    """A network to begin with, fp32, which pools by the mean."""
    g, draw = context.geometry, torch.Generator().manual_seed(context.seed)
    shapes = {"embed": (options.width, g.kv_heads * g.head_dim), "hidden": (options.hidden, 4 * options.width + 1)}
    made = {name: torch.randn(shape, generator=draw) / shape[1] ** 0.5 for name, shape in shapes.items()}
    last = torch.randn(options.hidden + 1, generator=draw) / options.hidden**0.5
    return made | {"pool": torch.zeros(options.width), "shift": torch.zeros(options.hidden), "last": last}


def found(held: list[Example], tables: Tensors, options: Options) -> dict[str, float]:
    """Precision and recall of predicted boundaries, and the share of all places that are labelled."""
    hits = caught = guessed = real = places = 0
    above = float(torch.logit(torch.tensor(options.sure)))
    for keys, label in held:
        logits = predicted.logits(keys, {name: table.to(keys) for name, table in tables.items()}, options.window)
        made = _base.chosen(logits, above, options.apart, options.most * keys.shape[1] // options.block)
        hits, guessed = hits + int((made & _near(label)).sum()), guessed + int(made.sum())
        caught, real = caught + int((label & _near(made)).sum()), real + int(label.sum())
        places += label.numel()
    return {
        "precision": hits / max(1, guessed), "recall": caught / max(1, real), "boundaries": real / max(1, places),
        "predicted": guessed / max(1, places),
    }  # fmt: skip


def _near(places: torch.Tensor) -> torch.Tensor:
    """bool [1,T]: is one of the places here, or one off?"""
    return functional.max_pool1d(places[:, None].float(), 3, 1, 1)[:, 0] > 0


def _weight(shown: list[Example]) -> torch.Tensor:
    """Places without a boundary for each one with it."""
    real = sum(int(label.sum()) for _, label in shown)
    return torch.tensor(sum(label.numel() for _, label in shown) / real - 1)


def given(context: Context, options: Options, layer: int) -> tuple[Tensors, torch.Tensor]:
    """The tables of an earlier plan, and its losses; raises InputError when it has none for this layer and window."""
    made = plan.read(options.weights)
    spec = None if made.read is None else made.read.prefill
    if spec is None or not spec.tables or (spec.leader, spec.window) != (layer, options.window):
        raise InputError(
            "the plan has no network for this layer's boundaries", got=options.weights,
            expected=f"one trained at layer {layer} with a window of {options.window}",
        )  # fmt: skip
    if context.model is not None:
        made.check(context.model.fingerprint)
    return dict(spec.tables), made.evidence.get("loss", torch.zeros(0))
