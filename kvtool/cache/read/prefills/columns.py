"""Single entries, by the attention that probes pay them: the same for all blocks of a chunk.

    a_j = Σ_i p_ij over probes i (the newest 5 % of the chunk's queries, and a seeded 5 % of the others), mean over the
          heads that choose together;   ã_j = a_j / #{probes i ≥ j}
    the best ã, as many as the budget has room for; with a mass τ at most p = min {n: the n largest a hold τ · Σ a}

(ZipVL: He et al., arXiv 2410.08584; probes are ZipCache's, arXiv 2405.14256.) With a mass, the p best of all the
entries of the chunk are listed, and a block reads those that stand before it.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.budgets._base import covering
from kvtool.cache.keep.selector import probes
from kvtool.cache.read.prefills._base import Job, best


class Rule:
    def __init__(self, job: Job):
        self.spec = job.spec
        rows = probes(job.q.shape[2], job.spec.seed).to(job.q.device)
        view = job.view(rows)
        paid = job.chosen_by(view.paid)  # [B,C,N]
        columns = torch.arange(paid.shape[2], device=paid.device)
        seen = (len(rows) - torch.searchsorted(view.rows, columns)).clamp_min(1)
        self.scores = paid / seen
        self.listed: torch.Tensor | None = None  # bool [B,1,N]
        if job.spec.mass:
            self.listed = torch.zeros_like(self.scores, dtype=torch.bool)
            for row, (sums, means) in enumerate(zip(paid[:, 0], self.scores[:, 0], strict=True)):
                count = covering(sums, slice(0, len(sums)), job.spec.mass)
                self.listed[row, 0, best(means, count)] = True

    def pick(self, low: int, high: int, first: int, near: int, count: int) -> torch.Tensor:
        scores = self.scores[..., first:near]
        if self.listed is None:
            return first + best(scores, count)
        listed = self.listed[..., first:near]
        count = min(count, int(listed.sum(-1).max()))
        index = best(scores.masked_fill(~listed, -1.0), count)
        real = listed.gather(-1, index)
        order = torch.argsort((~real).byte(), dim=-1, stable=True)  # what is not listed goes to the end
        return torch.where(real, first + index, -1).gather(-1, order)
