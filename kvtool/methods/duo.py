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
from typing import Any

import torch

from kvtool import gates
from kvtool.corpus.haystack import Haystack
from kvtool.corpus.passkey import multi_passkey
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, best, full_attention, share
from kvtool.slots import Keep

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


def at(budget: float) -> dict[str, Any]:
    """The share of full heads, beside windows of 80 entries in prompts of 1,000; longer ones hold less."""
    return {"full": max(0.0, (budget - 0.08) / 0.92)}


def calibrate(context: Context, options: Options) -> Decision:
    if context.model is None:
        raise InputError("duo trains on the model", remedy="pass the model, or a trace that names it")
    share(options.full, "full")
    eligible = full_attention(context.geometry)
    if options.gates:
        alpha, losses = gates.given(options.gates, eligible, history="loss")
    else:
        alpha, losses = train(context, options, eligible)
    full = best(alpha, round(options.full * int(eligible.sum())), eligible, context.seed) | ~eligible
    keep = Keep.heads(full, sink=options.sink, recent=options.recent)
    return Decision(
        keep, {"alpha": alpha, "loss": losses}, {"steps": len(losses), "full_heads": int((full & eligible).sum())}
    )


def train(context: Context, options: Options, eligible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha fp32 [L,K], distillation loss per step fp32 [steps])."""
    model = context.model
    assert model is not None
    alpha = context.resume.get("alpha", torch.ones(eligible.shape)).to(model.device, copy=True).requires_grad_(True)
    optimiser = torch.optim.AdamW([alpha], lr=options.lr, weight_decay=0.0)
    losses = context.resume.get("loss", torch.zeros(0)).tolist()
    if "moment" in context.resume:
        moments = {
            "exp_avg": context.resume["moment"].to(model.device, copy=True),
            "exp_avg_sq": context.resume["moment_sq"].to(model.device, copy=True),
        }
        optimiser.state[alpha] = {"step": torch.tensor(float(len(losses))), **moments}
    count = round(options.full * int(eligible.sum()))
    chosen = best(alpha.detach().cpu(), count, eligible, context.seed)
    settled = int(context.resume.get("settled", 0))
    straw = Haystack(model, "calibration")
    for step in range(len(losses), options.steps):
        length = options.lengths[step % len(options.lengths)]
        sample = multi_passkey(
            model, length=length, passkeys=options.passkeys, seed=context.seed, index=step, haystack=straw
        )
        rows = torch.cat([torch.arange(start - 1, stop - 1) for start, stop in sample.labels])
        optimiser.param_groups[0]["lr"] = options.lr * trapezoid(step, options.steps)
        recording = gates.record(model, sample.tokens)
        hidden = gates.gated(
            model, recording, alpha, sink=options.sink, recent=options.recent, own_full=options.own_full
        )
        distance = (hidden[rows] - recording.hidden[rows]).float().square().mean()
        optimiser.zero_grad()
        (distance + options.l1 * alpha[eligible.to(alpha.device)].abs().mean()).backward()
        optimiser.step()
        with torch.no_grad():
            alpha.clamp_(0.0, 1.0)
        losses.append(distance.item())
        now = best(alpha.detach().cpu(), count, eligible, context.seed)
        settled = settled + 1 if torch.equal(now, chosen) else 0
        chosen = now
        mean = float(alpha.detach().cpu()[eligible].mean())
        context.progress(step + 1, options.steps, f"loss {losses[-1]:.4f}, mean gate {mean:.2f}, settled {settled}")
        moments = optimiser.state[alpha]
        context.checkpoint(
            {
                "alpha": alpha.detach().cpu(),
                "loss": torch.tensor(losses),
                "settled": torch.tensor(settled),
                "moment": moments["exp_avg"].cpu(),
                "moment_sq": moments["exp_avg_sq"].cpu(),
            }
        )
        if options.patience and settled >= options.patience and step >= options.steps // 2:
            break
    return alpha.detach().cpu(), torch.tensor(losses)


def trapezoid(step: int, steps: int, floor: float = 0.1) -> float:
    """Learning rate factor: up over the first fifth, down over the last, never below `floor`."""
    ramp = max(1, steps // 5)
    return max(floor, min(1.0, (step + 1) / ramp, (steps - step) / ramp))
