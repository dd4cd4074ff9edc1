"""APE: documents that were read apart take part in attention at a temperature, and with a scale.

Yang et al., arXiv 2502.05431, ICLR 2025 (adaptive parallel encoding).

    each document is read after one shared prefix, at the same positions; what follows begins behind the longest
    o_c, l_c: attention to all documents at logits / T, not causal;   o_x, l_x: to prefix, question and what is written
    weights  = softmax([S · T · l_c, l_x]),   l: log-sum-exp

A document's keys and values depend on the prefix and itself alone: they are made once, kept on disk, and put together
with any others. With T = S = 1 attention is over all entries as they are. But a query then meets as many first tokens,
and near neighbours, as there are documents, and spreads its attention over them: T < 1 sharpens it, S < 1 gives the
documents together less of it. Nothing is trained, and one document at T = S = 1 is sequential reading, exactly.

T and S are those of a grid from 1 downwards, the same for all layers, that bring the predictions of known answers
nearest to those after sequential reading: prompts of several documents, one of which has the answer.

As in the paper and its released code (Infini-AI-Lab/APE): the formula, shared positions, the prefix outside of it, the
grid below 1. Log-sum-exps stay in fp32 here; the code casts them to the model's dtype. Its defaults, T = S = 0.9, are
`mode=given`. Objective and calibration prompts are ours: the paper picks T and S by the score of a validation set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvtool.corpus.shelves import shelves
from kvtool.errors import InputError
from kvtool.measuring.apart import Apart, divergence, loss
from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Documents, Position, Read

STATISTICS = ()
MODEL = True


@dataclass(frozen=True)
class Options:
    """mode: calibrated finds temperature and scale; given takes them as they are. temperature, scale: T and S of
    mode=given. lowest, step: the grid of both, 1, 1 − step, … down to the lowest. objective: kl from sequential
    reading, or the loss of the answer. position: documents are all where they were read (shared), or one behind the
    other (contiguous). samples, documents, tokens: calibration prompts, documents of each, their length."""

    mode: Literal["calibrated", "given"] = "calibrated"
    temperature: float = 0.9
    scale: float = 0.9
    lowest: float = 0.4
    step: float = 0.1
    objective: Literal["kl", "loss"] = "kl"
    position: Position = "shared"
    samples: int = 8
    documents: int = 4
    tokens: int = 256

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "documents", "tokens")
        for name in ("temperature", "scale", "lowest", "step"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"bad option {name}", got=getattr(self, name), expected="more than 0, at most 1")

    @property
    def grid(self) -> list[float]:
        """From 1 down."""
        count = int((1 - self.lowest) / self.step + 1e-9) + 1
        return [round(1 - at * self.step, 6) for at in range(count)]


def calibrate(context: Context, options: Options) -> Decision:
    layers = context.geometry.layers

    def how(temperature: float, scale: float) -> Documents:
        return Documents(torch.full((layers,), temperature), torch.full((layers,), scale), options.position)

    if options.mode == "given":
        return _decision(context, how(options.temperature, options.scale))
    model, grid = context.running, options.grid
    found = torch.zeros(2, len(grid), len(grid), dtype=torch.float64)
    before = 0.0
    made = shelves(
        model, samples=options.samples, documents=options.documents, tokens=options.tokens, seed=context.seed,
        haystack="calibration",
    )  # fmt: skip
    for done, shelf in enumerate(made, 1):
        apart = Apart(model, shelf)
        full = apart.sequential()
        before += loss(full, shelf.answer) / len(made)
        for row, temperature in enumerate(grid):
            for column, scale in enumerate(grid):
                p = apart.together(how(temperature, scale))
                both = torch.tensor([divergence(full, p), loss(p, shelf.answer)], dtype=torch.float64)
                found[:, row, column] += both / len(made)
        context.progress(done, len(made), "documents")
    kl, losses = found
    best = int((kl if options.objective == "kl" else losses).argmin())  # of equals the nearest to T = S = 1
    temperature, scale = grid[best // len(grid)], grid[best % len(grid)]
    decision = _decision(context, how(temperature, scale))
    decision.evidence.update({"kl": kl, "loss": losses, "grid": torch.tensor(grid, dtype=torch.float64)})
    decision.facts.update({"temperature": temperature, "scale": scale, "sequential_loss": before})
    return decision


def _decision(context: Context, documents: Documents) -> Decision:
    return Decision(read=Read(torch.ones(context.geometry.layers), unit=1, documents=documents))
