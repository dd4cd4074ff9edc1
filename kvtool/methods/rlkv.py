"""RLKV: gates per KV head that survive when the model's own sampled answers are rewarded, and full heads cost.

Du et al., arXiv 2510.08525.

    o = α·full + (1 − α)·window per KV head, both over the gated run's own states, in rollouts and training alike
    loss = −GRPO(rewards of sampled answers) + β′·mean |α|,   β′ = β·(exp(r̄) − 1) if r̄ > τ, else 0

r̄ is the batch's mean reward: gates are pulled down only while answers stay right, and what then breaks them is pulled
up again. Advantages are rewards normalised within the samples of a prompt; no KL term; α starts at 1, Adam trains it,
and it is clamped to [0, 1] in place after each step. A reward is 1 when the whole sampled answer is right. Problems
are those that the unchanged model solves. Deployed as DuoAttention: the `full` share of the gates over all layers
keeps everything, the others `sink` first and `recent` last entries at their original positions.

    memory 2·b·D·(K_full·t + K_window·min(t, sink + recent))

Published: mathematics problems of DeepScaleR with answers up to 7,168 tokens, 32 prompts a step with 4 samples each,
185 steps, lr 0.01, β 0.001 (0.0025 for Qwen3), τ 0.5, clip 0.4, window 128 + 256 in training and 16 + 64 when
deployed. The demo model solves no mathematics: ours are passkeys and needles (`kvtool/measuring/problems.py`) of a few
hundred tokens with answers of about 6 to 12. A prompt's samples share its prefill, so 16 of them cost little more than
4. Few steps need the larger lr, and the larger β. Longer training takes every gate that no answer needs to 0, where
nothing ranks them. The window is trained at the size it is deployed at. `updates` above 1 reuse the samples; only then
can `clip` bite. Card A5 is what this was written from; the paper's text and code were not read again.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from kvtool.corpus.base import Sample
from kvtool.measuring import rollouts
from kvtool.measuring.problems import problems
from kvtool.methods._base import Context, Decision
from kvtool.methods._gates import Training, given, split
from kvtool.methods._gates import at as at
from kvtool.model import Model
from kvtool.options import at_least

STATISTICS = ()
MODEL = True
REUSE = "gates"


@dataclass(frozen=True)
class Options:
    """full: share of KV heads that keep everything. sink, recent: entries of the others, tokens. steps: optimiser
    steps at most. tasks: what is asked: passkey, needle, repeat, two-hop. lengths: prompt lengths, tokens. problems:
    prompts that the steps take turns with. solved: use only problems that the unchanged model solves. batch: prompts
    a step. samples: answers per prompt. updates: optimiser steps on the same answers. temperature: of sampling.
    lr: learning rate. l1: weight β of the gates' mean. threshold: mean reward τ above which it counts. clip: how far
    a probability may move on the same answers, as a ratio. patience: steps over which the chosen heads must stay the
    same to stop early (0: never). gates: take the gates of this plan, or of a released adapter_weights.tsv, instead
    of training."""

    full: float = 0.5
    sink: int = 16
    recent: int = 64
    steps: int = 16
    tasks: tuple[str, ...] = ("passkey", "needle")
    lengths: tuple[int, ...] = (256, 384)
    problems: int = 16
    solved: bool = True
    batch: int = 4
    samples: int = 16
    updates: int = 1
    temperature: float = 0.6
    lr: float = 0.05
    l1: float = 0.5
    threshold: float = 0.5
    clip: float = 0.4
    patience: int = 8
    gates: str = ""

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "problems", "batch", "samples", "updates")


def calibrate(context: Context, options: Options) -> Decision:
    ready = given(context, options.gates, "reward") if options.gates else train(context, options)
    return split(context, options, *ready, name="reward")


def penalty(reward: float, threshold: float, strength: float) -> float:
    """β′: the weight of the gates' mean at this mean reward."""
    return strength * math.expm1(reward) if reward > threshold else 0.0


def train(context: Context, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha fp32 [L,K], mean reward per step fp32 [steps])."""
    model = context.running
    training = Training(context, options, "reward", options.updates)
    first = len(training.history)
    asked = problems(
        model, options.tasks, options.lengths, options.problems, seed=context.seed, solved=options.solved,
        found=lambda count: context.progress(first, options.steps, f"problem {count} of {options.problems}"),
    )  # fmt: skip
    for step in range(first, options.steps):
        turn = [asked[index % len(asked)] for index in range(step * options.batch, (step + 1) * options.batch)]
        if training.record(_step(model, turn, training, options, f"{context.seed}/{step}")):
            break
    return training.outcome()


def _step(model: Model, turn: list[Sample], training: Training, options: Options, seed: str) -> float:
    """Answer the turn's problems and move the gates; the mean reward."""
    groups: list[Group] = []
    for update in range(options.updates):
        training.optimiser.zero_grad()
        for index, problem in enumerate(turn):
            if update == 0:
                groups.append(_pull(model, problem, training.alpha, options, seed=f"{seed}/{index}"))
            elif groups[index].teaches:
                _pull(model, problem, training.alpha, options, group=groups[index])
        reward = _mean(groups)
        (penalty(reward, options.threshold, options.l1) * training.mean()).backward()
        training.move()
    return _mean(groups)


@dataclass(frozen=True)
class Group:
    """Sampled answers int64 [B,A] to one prompt, the log-probabilities fp32 [B,A] that they were drawn with, and
    their rewards fp32 [B]."""

    answers: torch.Tensor
    logs: torch.Tensor
    rewards: torch.Tensor

    @property
    def teaches(self) -> bool:
        """Equal rewards say nothing of what was better."""
        return bool((self.rewards != self.rewards[0]).any())


def _mean(groups: list[Group]) -> float:
    return float(torch.stack([group.rewards for group in groups]).mean())


def _pull(
    model: Model, problem: Sample, alpha: torch.Tensor, options: Options, *, group: Group | None = None, seed: str = ""
) -> Group:
    """Add to alpha's gradient what the answers to a problem teach; they are sampled unless given."""
    assert problem.answer is not None
    last = int(problem.tokens[-1])
    cache = rollouts.prefill(model, problem.tokens, alpha, sink=options.sink, recent=options.recent)
    if group is None:
        answers, logs = rollouts.sample(
            model, cache, last, samples=options.samples, steps=len(problem.answer), temperature=options.temperature,
            generator=torch.Generator().manual_seed(random.Random(seed).getrandbits(60)),
        )  # fmt: skip
        group = Group(answers, logs, (answers == problem.answer).all(1).float())
    if group.teaches:
        logs = rollouts.log_probabilities(model, cache, last, group.answers, temperature=options.temperature)
        gain = rollouts.surrogate(logs.cpu(), group.logs, rollouts.advantages(group.rewards), options.clip)
        (-gain / options.batch).backward()
    return group
