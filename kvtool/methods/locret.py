"""Locret: a small network per layer reads each token's own query, key and value, and says how much answers will look
at it.

Huang et al., arXiv 2410.01805, with its released code.

    s = W₂ · SiLU(W₁ · [q; k; v]),  q, k, v before RoPE;   keep the best C − r per KV head, and the r newest
    label of entry j = max over the rows that follow the context, and over the KV head's queries, of q·k_j/√D
    loss = SmoothL1(s, label) + 0.0025 · mean (s_j − s_{j+1})²;   memory 2·b·D·K·L·C

The label is a logit, after RoPE and before the softmax, of the model itself, which stays frozen. A token's score is
known once the token is in, whatever comes after it: so eviction needs no question, and `when=chunk` evicts as chunks
of the prompt come in. Published: 1,024 hidden units, 3,000 prompts with answers of LongAlpaca at up to 10,240 tokens,
AdamW with betas .9, .95 and lr 5e-4, 2,000 of 3,000 steps warm-up, clipping at 0.5 by value, budget 6,000 with the
newest 2,500 safe ("stabilizers") until the last chunk.

Ours is smaller: `hidden` units, prompts of a few hundred tokens made by `kinds`, steps on what one pass over each
prompt showed. All that follows the context answers, questions too, since in the cache they come after it as well. The
newest `recent` stay in the last chunk too: a cache does not know which chunk is the last. The eight needles that
replay asks for are among the prompts only if `kinds` names them. Published positions are `reindex`; ours are the
original ones unless told, since our prompts do not go beyond what the model was trained for, where reindexing only
takes away the true distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from kvtool.cache.keep.scores.learned import features, retained
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.methods._base import Context, Decision
from kvtool.methods._training import Tensors, Trainer
from kvtool.options import at_least
from kvtool.slots import Keep, Select
from kvtool.statistics._base import States

STATISTICS = ()
MODEL = True
REUSE = "weights"

CLIP = 0.5
TABLES = ("hidden", "score")


@dataclass(frozen=True)
class Options:
    """budget: entries each KV head keeps of the prompt, a share when at most 1, else a count. recent: newest entries
    that always stay. sink: first entries that always stay. when: prefill (once, after the prompt) or chunk (after every
    chunk of it). position: original or reindex. hidden: units of a layer's network. kinds: training prompts: passkey,
    passkeys, needle, two-hop, text. lengths: their lengths, tokens. prompts: of each kind and length. steps: optimiser
    steps, one prompt each. lr: learning rate. smooth: weight of the difference of neighbours. weights: take the
    networks of this plan instead of training."""

    budget: float = 0.25
    recent: int = 32
    sink: int = 4
    when: Literal["prefill", "chunk"] = "prefill"
    position: Literal["original", "reindex"] = "original"
    hidden: int = 64
    kinds: tuple[str, ...] = ("passkey", "passkeys", "two-hop", "text")
    lengths: tuple[int, ...] = (512, 1024)
    prompts: int = 4
    steps: int = 300
    lr: float = 2e-3
    smooth: float = 0.0025
    weights: str = ""

    def __post_init__(self) -> None:
        at_least(0, self, "recent", "sink")
        at_least(1, self, "hidden", "prompts", "steps")
        if self.budget <= 0:
            raise InputError("bad option budget", got=self.budget, expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    tables, losses = _training.given(context, options.weights, TABLES) if options.weights else train(context, options)
    everything = torch.ones(g.layers, g.kv_heads, dtype=torch.bool)
    select = Select(
        torch.full((g.layers, g.kv_heads), options.budget), score="learned", sink=options.sink, recent=options.recent,
        when=options.when, tables=tables,
    )  # fmt: skip
    keep = Keep.heads(everything, sink=0, recent=1, select=select, position=options.position)
    return Decision(
        keep, {"loss": losses}, {"steps": len(losses), "table_bytes": sum(t.nbytes for t in tables.values())}
    )


def train(context: Context, options: Options) -> tuple[Tensors, torch.Tensor]:
    """(bf16 tables of `cache/keep/scores/learned.py`, mean loss of a layer per step fp32 [steps])."""
    model = context.running
    layers = _training.whole(context.geometry)
    pool = []
    made = _training.prompts(model, options.kinds, options.lengths, options.prompts, context.seed)
    for number, sample in enumerate(made):
        pool.append(example([seen for seen in _training.states(model, sample) if seen.layer in layers]))
        context.progress(0, options.steps, f"prompt {number + 1} of {len(made)}")
    rates = dict.fromkeys(TABLES, options.lr)
    trainer = Trainer(context, fresh(context, options, len(layers)), options.steps, lr=rates, clip=CLIP)
    draw = [torch.randperm(len(pool), generator=torch.Generator().manual_seed(context.seed + turn)) for turn in
            range(-(-options.steps // len(pool)))]  # fmt: skip
    for number in torch.cat(draw).tolist()[len(trainer.losses) : options.steps]:
        x, label = pool[number]
        scores = retained(x.float(), *trainer.tensors.values())
        apart = functional.smooth_l1_loss(scores, label, reduction="none").mean((1, 2))
        rough = (scores[..., 1:] - scores[..., :-1]).square().mean((1, 2))
        (apart + options.smooth * rough).sum().backward()
        trainer.step(float(apart.detach().mean()))
    tensors, losses = trainer.done()
    return _training.placed(context, layers, tensors), losses


def example(seen: list[States]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each layer's network reads of a prompt's context, bf16 [L,T,C], and the labels fp32 [L,K,T]."""
    read, labels = [], []
    for states in seen:
        context = states.sample.question
        q, k = (states.rotary.unrotate(x, states.table)[:, :context] for x in (states.q, states.k))
        read.append(features(q, k, states.v[:, :context]).bfloat16())
        labels.append(label(states, context))
    return torch.stack(read), torch.stack(labels)


def label(states: States, context: int | None) -> torch.Tensor:
    """fp32 [K,T]: the largest logit that a row after the first `context` tokens has for each of these."""
    return states.logits(context or 0, keys=context).amax((1, 2))


def fresh(context: Context, options: Options, layers: int) -> Tensors:
    """Networks to begin with, fp32: small enough that scores begin at about one."""
    g, draw = context.geometry, torch.Generator().manual_seed(context.seed)
    width = (g.query_heads + 2 * g.kv_heads) * g.head_dim
    shapes = {"hidden": (layers, options.hidden, width), "score": (layers, g.kv_heads, options.hidden)}
    return {name: torch.randn(shape, generator=draw) / shape[-1] ** 0.5 for name, shape in shapes.items()}
