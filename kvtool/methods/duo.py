"""DuoAttention: a gate per KV head, trained on passkey recall, tells retrieval heads from streaming heads.

Xiao et al., arXiv 2410.10819, ICLR 2025.

    o = α·full + (1 − α)·window per KV head;   loss = mean over answer tokens and channels of (h − h')² + λ·mean |α|

h, h' are final-norm hidden states of the unchanged and the gated run on prompts with several passkeys; α starts
at 1, is clamped to [0, 1], and AdamW (no decay) trains it with a trapezoid learning rate. A head keeps everything
iff its α reaches the (1 − full) quantile over all heads, ties broken by seeded noise. The others keep `sink`
first and `recent` last entries, at their original positions.

    memory 2·b·d·(K_full·t + K_window·min(t, sink + recent))

Ours is the same optimisation made affordable: short prompts, few steps, windows trained at the size they are
deployed at (published: sink 128 and recent 256 in training, 64 and 256 when deployed, 2000 steps, prompts of 1K
to 32K tokens), and an early stop when the ranking has settled. `recent` counts the query's own entry; the
released cache sees one more. `own_full` takes the full term from the gated run (as RLKV does) instead of the
unchanged one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtool.corpus.haystack import Haystack
from kvtool.corpus.passkey import multi_passkey
from kvtool.measuring import gates
from kvtool.methods._base import Context, Decision
from kvtool.methods._gates import Training, given, split
from kvtool.methods._gates import at as at
from kvtool.options import at_least

STATISTICS = ()
MODEL = True
REUSE = "gates"


@dataclass(frozen=True)
class Options:
    """full: share of KV heads that keep everything. sink, recent: entries of the others, tokens. steps: optimiser
    steps at most. lengths: prompt lengths, tokens. passkeys: keys per prompt. lr: learning rate. l1: weight λ of
    the gates' mean. patience: steps over which the chosen heads must stay the same to stop early (0: never).
    own_full: full term from the gated run. gates: take the gates of this plan, or of a released
    full_attention_heads.tsv, instead of training."""

    full: float = 0.5
    sink: int = 16
    recent: int = 64
    steps: int = 60
    lengths: tuple[int, ...] = (512, 1536)
    passkeys: int = 5
    lr: float = 0.05
    l1: float = 0.05
    patience: int = 20
    own_full: bool = False
    gates: str = ""

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "lengths", "passkeys")


def calibrate(context: Context, options: Options) -> Decision:
    ready = given(context, options.gates, "loss") if options.gates else train(context, options)
    return split(context, options, *ready, name="loss")


def train(context: Context, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha fp32 [L,K], distillation loss per step fp32 [steps])."""
    model = context.running
    training = Training(context, options, "loss")
    straw = Haystack(model, "calibration")
    for step in range(len(training.history), options.steps):
        length = options.lengths[step % len(options.lengths)]
        sample = multi_passkey(
            model, length=length, passkeys=options.passkeys, seed=context.seed, index=step, haystack=straw
        )
        rows = torch.cat([torch.arange(start - 1, stop - 1) for start, stop in sample.labels])
        training.optimiser.param_groups[0]["lr"] = options.lr * trapezoid(step, options.steps)
        recording = gates.record(model, sample.tokens)
        hidden = gates.gated(
            model, recording, training.alpha, sink=options.sink, recent=options.recent, own_full=options.own_full
        )
        distance = (hidden[rows] - recording.hidden[rows]).float().square().mean()
        training.optimiser.zero_grad()
        (distance + options.l1 * training.mean()).backward()
        training.move()
        if training.record(distance.item()):
            break
    return training.outcome()


def trapezoid(step: int, steps: int, floor: float = 0.1) -> float:
    """Learning rate factor: up over the first fifth, down over the last, never below `floor`."""
    ramp = max(1, steps // 5)
    return max(floor, min(1.0, (step + 1) / ramp, (steps - step) / ramp))
