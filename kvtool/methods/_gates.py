"""What methods with one gate α per KV head share: training that resumes and stops early, and the split of heads.

Heads whose gates are the best keep everything, the others sinks and a window. α starts at 1 and is clamped to [0, 1];
training may stop, after half of its steps, once the chosen heads have stayed the same for `patience` steps.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from kvtool.measuring import gates
from kvtool.methods._base import Context, Decision, best, full_attention, share
from kvtool.slots import Keep

MOMENTS = ("exp_avg", "exp_avg_sq")
WINDOW = 0.08  # of a prompt of 1,000 tokens: 16 sinks and 64 recent entries


class Options(Protocol):
    """What these methods' options have in common; see `methods/duo.py`."""

    @property
    def full(self) -> float: ...
    @property
    def sink(self) -> int: ...
    @property
    def recent(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def patience(self) -> int: ...


def at(budget: float) -> dict[str, Any]:
    """The share of full heads, beside windows of 80 entries in prompts of 1,000; longer ones hold less."""
    return {"full": max(0.0, (budget - WINDOW) / (1 - WINDOW))}


def split(context: Context, options: Options, alpha: torch.Tensor, history: torch.Tensor, *, name: str) -> Decision:
    """alpha fp32 [L,K] → the plan. history: what every step of training brought, by that name in the evidence."""
    eligible = full_attention(context.geometry)
    full = best(alpha, _count(options, eligible), eligible, context.seed) | ~eligible
    keep = Keep.heads(full, sink=options.sink, recent=options.recent)
    facts = {"steps": len(history), "full_heads": int((full & eligible).sum())}
    return Decision(keep, {"alpha": alpha, name: history}, facts)


def given(context: Context, path: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of another plan or table, and that plan's history; see `gates.given`."""
    return gates.given(path, full_attention(context.geometry), history=name)


class Training:
    """α and its optimiser, from where an interrupted run left off. `history`, called `name`, has a number a step, in
    which the optimiser takes `updates` steps of its own."""

    def __init__(self, context: Context, options: Options, name: str, updates: int = 1):
        self.context, self.options, self.name, resume = context, options, name, context.resume
        self.eligible, device = full_attention(context.geometry), context.running.device
        start = resume.get("alpha", torch.ones(self.eligible.shape))
        self.alpha = start.to(device, copy=True).requires_grad_(True)
        self.optimiser = torch.optim.AdamW([self.alpha], lr=options.lr, weight_decay=0.0)
        self.history: list[float] = resume.get(name, torch.zeros(0)).tolist()
        if self.history:
            moments = {moment: resume[moment].to(device, copy=True) for moment in MOMENTS}
            taken = torch.tensor(float(len(self.history) * updates))
            self.optimiser.state[self.alpha] = {"step": taken, **moments}
        self.settled = int(resume.get("settled", 0))
        self.chosen = self._chosen()

    def mean(self) -> torch.Tensor:
        """The mean of the gates that train, differentiable; at 0 nothing pulls at them."""
        return self.alpha[self.eligible.to(self.alpha.device)].abs().mean()

    def move(self) -> None:
        """Take a step along the gradient."""
        self.optimiser.step()
        with torch.no_grad():
            self.alpha.clamp_(0.0, 1.0)

    def record(self, value: float) -> bool:
        """A step is done, and brought `value`. Is training over?"""
        self.history.append(value)
        now = self._chosen()
        self.settled = self.settled + 1 if torch.equal(now, self.chosen) else 0
        self.chosen, done, steps = now, len(self.history), self.options.steps
        text = f"{self.name} {value:.4f}, mean gate {self.mean().item():.2f}, settled {self.settled}"
        self.context.progress(done, steps, text)
        self.context.checkpoint(
            {
                "alpha": self.alpha.detach().cpu(),
                self.name: torch.tensor(self.history),
                "settled": torch.tensor(self.settled),
                **{moment: self.optimiser.state[self.alpha][moment].cpu() for moment in MOMENTS},
            }
        )
        return bool(self.options.patience and self.settled >= self.options.patience and done > steps // 2)

    def outcome(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha fp32 [L,K], history fp32 [steps])."""
        return self.alpha.detach().cpu(), torch.tensor(self.history)

    def _chosen(self) -> torch.Tensor:
        alpha = self.alpha.detach().cpu()
        return best(alpha, _count(self.options, self.eligible), self.eligible, self.context.seed)


def _count(options: Options, eligible: torch.Tensor) -> int:
    return round(share(options.full, "full") * int(eligible.sum()))
