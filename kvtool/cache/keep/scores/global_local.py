"""What all queries pay an entry and what the last ones pay it, each against its own mean.

    s_j = L_j / mean(L) + G_j / mean(G)
    G_j = Σ_i p_ij / t_j over all observed queries, of which t_j see entry j;   L_j = Σ_i p_ij over the last w of them

(EMS: arXiv 2412.08521, reconstructed: the abstract names a score of global and local importance, not its formula.)
w is `settings["window"]`. Means are over the entries that all of those w queries see, so that a window's own entries,
which few queries have seen, do not weigh in. [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View, probabilities

SEES = "queries"


def score(view: View) -> torch.Tensor:
    newest = view.rows[-int(view.spec.settings["window"]) :]
    everywhere: torch.Tensor | float = 0.0
    lately: torch.Tensor | float = 0.0
    for rows, p in probabilities(view):
        everywhere = everywhere + p.sum(2)
        lately = lately + p[:, :, rows >= newest[0]].sum(2)
    assert isinstance(everywhere, torch.Tensor)
    assert isinstance(lately, torch.Tensor)
    columns = torch.arange(view.k.shape[2], device=view.k.device)
    seen = (len(view.rows) - torch.searchsorted(view.rows, columns)).clamp_min(1)
    before = slice(0, int(newest[0]) + 1)
    local, overall = (x / x[..., before].mean(-1, keepdim=True).clamp_min(1e-30) for x in (lately, everywhere / seen))
    return local + overall
