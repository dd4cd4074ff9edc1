"""LoCoCo: part of a fixed number of slots holds mixtures of all entries that are not kept, weighed by a convolution.

Cai et al., arXiv 2406.05317, ICML 2024, with its released code.

    W = (1 − λ) R + λ · softmax(ReLU(conv([K; V])));   k̂ = W k,   v̂ = W v
    R: one-hot, what the selection alone would keep;   memory 2·b·D·K·L·C for C slots, and C·D·kernel weights a layer

Entries are scored by the attention of the newest queries, summed. The best of C stay as they are; the `slots` that
come after them take in everything else. λ = 0 is dropping. One convolution a layer, for all its heads; each row of W
sums to 1, so a slot weighs in attention as one entry. Positions are the original ones, and a slot's key is a mean of
keys that were rotated for different places.

Published: Conv1d of kernel 21, M = 512 slots of which half are mixtures, blocks of 512 whose own queries score, none of
the newest safe, a buffer of 16 between two compressions when decoding; convolutions that begin as standard normal, λ
(unclamped) at 0.5; 1,000 steps of next-token prediction on RedPajama, 128 sequences each, which also train norms and
embeddings (×5) beside the convolutions (×1000) and optionally LoRA. There the best come first and then the slots.

Ours trains convolutions and λ in [0, 1] only, layer by layer, with the model frozen: on rows that follow a context,
the output of attention over the compressed context (after the output projection) is to match that over all of it,

    loss = mean over layers of ‖o' − o‖² / ‖o‖²

for one compression, at each of the budgets `trained` in turn, so that one training serves them all. The mixtures are
the min(`slots`, C/2) least of C, which is the published half where C = 2·`slots`, and so a budget may be a share of the
prompt. Slots stand where R's entry stood. `window` and `recent` default to less than a block, as prompts are short.
Prefill in blocks (`when=chunk`) and the compression of what is decoded (`when=step`) are two settings here, not one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from kvtool.cache.keep.merges.convolution import Tables, mixed
from kvtool.cache.keep.selector import Selector
from kvtool.cache.lane import Step
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.methods._base import Context, Decision
from kvtool.methods._training import Tensors, Trainer
from kvtool.model import Model
from kvtool.options import at_least
from kvtool.slots import Keep, Select
from kvtool.statistics._base import States
from kvtool_kernels.attend.reference import logits

STATISTICS = ()
MODEL = True
REUSE = "weights"

CLIP = 0.5
TABLES = ("convolution", "bias", "share")
FASTER = 20.0  # λ's learning rate, as a multiple
START = 0.5  # λ


@dataclass(frozen=True)
class Options:
    """budget: entries each KV head holds of the prompt, slots included, a share when at most 1, else a count. slots:
    mixtures among them, at most half. trained: budgets that training takes turns with. kernel: entries that the
    convolution sees. window: newest queries that score. pool: neighbours whose largest score counts (1: none, as
    published). recent: newest entries that always stay. when: prefill (once, after the prompt), chunk (after every
    chunk of it), or step (after the prompt and while decoding). buffer: entries by which the budget is undercut at a
    decode step, so that the next so many compress nothing. kinds: training prompts: passkey, passkeys, needle, two-hop,
    text. lengths: their lengths, tokens. prompts: of each kind and length. steps: optimiser steps, one prompt each. lr:
    learning rate. weights: take the convolutions of this plan instead of training."""

    budget: float = 0.25
    slots: int = 32
    trained: tuple[float, ...] = (0.1, 0.25, 0.5)
    kernel: int = 21
    window: int = 32
    pool: int = 1
    recent: int = 32
    when: Literal["prefill", "chunk", "step"] = "prefill"
    buffer: int = 16
    kinds: tuple[str, ...] = ("text", "passkeys")
    lengths: tuple[int, ...] = (512,)
    prompts: int = 16
    steps: int = 60
    lr: float = 1e-3
    weights: str = ""

    def __post_init__(self) -> None:
        at_least(1, self, "slots", "window", "steps", "prompts", "pool", "kernel")
        at_least(0, self, "recent", "buffer")
        if self.budget <= 0 or self.kernel % 2 == 0 or self.pool % 2 == 0:
            raise InputError(
                "bad option", got=f"budget {self.budget}, kernel {self.kernel}, pool {self.pool}",
                expected="budget > 0, odd kernel and pool",
            )  # fmt: skip
        if not all(0 < share < 1 for share in self.trained):
            raise InputError("bad option trained", got=self.trained, expected="shares above 0 and below 1")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    if options.weights:
        tables, losses = _training.given(context, options.weights, TABLES)
    else:
        tables, losses = train(context, options)
    everything = torch.ones(g.layers, g.kv_heads, dtype=torch.bool)
    keep = Keep.heads(everything, sink=0, recent=1, select=selection(context, options, options.budget, tables))
    facts = {"steps": len(losses), "table_bytes": sum(table.nbytes for table in tables.values())}
    return Decision(keep, {"loss": losses}, facts)


def selection(context: Context, options: Options, budget: float, tables: Tensors) -> Select:
    """What is deployed; without tables, what says which entries stay."""
    stepping = options.when == "step"
    return Select(
        torch.full((context.geometry.layers, context.geometry.kv_heads), budget), observed=options.window,
        reduce="sum", group="sum", pool="max" if options.pool > 1 else "none", kernel=options.pool,
        recent=max(options.recent, options.buffer) if stepping else options.recent, when=options.when, decay=0.0,
        history=options.buffer if stepping else 0, slack=options.buffer if stepping else 0,
        merge="convolution" if tables else "drop", tables=tables,
    )  # fmt: skip


def train(context: Context, options: Options) -> tuple[Tensors, torch.Tensor]:
    """(bf16 tables of `cache/keep/merges/convolution.py`, mean loss of a layer per step fp32 [steps])."""
    model = context.running
    layers = _training.whole(context.geometry)
    made = _training.prompts(model, options.kinds, options.lengths, options.prompts, context.seed)
    rates = {"convolution": options.lr, "bias": options.lr, "share": FASTER * options.lr}
    trainer = Trainer(context, fresh(context, options, len(layers)), options.steps, lr=rates, clip=CLIP)
    specs = [selection(context, options, budget, {}) for budget in options.trained]
    for step in range(len(trainer.losses), options.steps):
        seen, spec = _training.states(model, made[step % len(made)]), specs[step % len(specs)]
        shown = 0.0
        for number, layer in enumerate(layers):  # layer by layer, so that no two graphs are held at once
            kernel, bias, share = (trainer.tensors[name][number] for name in TABLES)
            missed = loss(model, spec, seen[layer], (kernel, bias, share))
            if not missed.requires_grad:
                raise InputError(
                    "no entry is mixed in training", got=f"{made[step % len(made)].question} entries, recent "
                    f"{options.recent}, budget {options.trained[step % len(specs)]}",
                    remedy="train on longer prompts, or with larger budgets or fewer recent entries",
                )  # fmt: skip
            missed.backward()
            shown += float(missed.detach()) / len(layers)
        trainer.step(shown)
        with torch.no_grad():
            trainer.tensors["share"].clamp_(0.0, 1.0)
    tensors, losses = trainer.done()
    return _training.placed(context, layers, tensors), losses


def fresh(context: Context, options: Options, layers: int) -> Tensors:
    """Convolutions to begin with, fp32: logits of about 1 for inputs of about 1."""
    draw, width = torch.Generator().manual_seed(context.seed), 2 * context.geometry.head_dim
    shape = (layers, options.slots, width, options.kernel)
    return {
        "convolution": torch.randn(shape, generator=draw) / (width * options.kernel) ** 0.5,
        "bias": torch.zeros(shape[:2]),
        "share": torch.full((layers,), START),
    }


def loss(model: Model, spec: Select, states: States, tables: Tables) -> torch.Tensor:
    """‖o' − o‖² / ‖o‖² of one layer, over the rows that follow the sample's context."""
    context, heads = states.sample.question, list(range(len(states.k)))
    assert context is not None
    q, k, v = (x[None, :, :context] for x in (states.q, states.k, states.v))
    made = Selector(spec, spec.budget[states.layer].tolist(), states.layer, heads)
    step = Step(0, states.scale, states.softcap)
    made.observe(q, 0, k, v, step, {})
    view = made.view(k, v, step, {})
    scores = made.scores(view)
    count = min(context, made.limits(context)[0])
    index = made.choose(view, scores, count, scores)
    sides = mixed((k.float(), v.float()), scores, index, tables, made.free(context))
    projection = model.output_projection(states.layer).float()
    full = attended(states, context, (k.float(), v.float())) @ projection.T
    short = attended(states, context, sides) @ projection.T
    return (short - full).square().sum() / full.square().sum().clamp_min(1e-12)


def attended(states: States, context: int, sides: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Attention of the rows after the context over sides (k, v) [1,K,N,D], which stand for it, and over one another;
    fp32 [T,H·D], differentiable in sides."""
    k, v = (
        torch.cat([side[0], x[:, context:].float()], dim=1) for side, x in zip(sides, (states.k, states.v), strict=True)
    )
    found = logits(states.q[None, :, context:].float(), k[None], scale=states.scale, softcap=states.softcap)[0]
    tokens = found.shape[1]
    later = torch.ones(found.shape[1:], dtype=torch.bool, device=k.device).triu(k.shape[1] - tokens + 1)
    found = found.masked_fill(later, float("-inf"))
    if states.sink_logits is not None:
        found = torch.cat([found, states.sink_logits.float()[:, None, None].expand(-1, tokens, 1)], dim=-1)
        v = functional.pad(v, (0, 0, 0, 1))
    out = torch.einsum("kgts,ksd->kgtd", torch.softmax(found, dim=-1).unflatten(0, (len(k), -1)), v)
    return out.permute(2, 0, 1, 3).flatten(1)
