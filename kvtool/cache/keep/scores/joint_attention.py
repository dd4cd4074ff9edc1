"""The largest share that an observed query pays the entry, in the mean over all heads, against the layer's threshold.

    s_j = max_i mean_h p_ij / θ,   θ the table "threshold" [L]      (MPCache: Zeng et al., arXiv 2501.06807)

So entries of s ≥ 1 are those that some query gives at least θ. Where θ is 0, s is 1 more than without. Settings:
"scaled" logits, "causal" ones (else each query sees all entries); of prompts longer than "long" only the newest share
"long_share" of the entries' queries look. Heads that share no lane are not averaged here. [B,K,S] fp32.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kvtool.cache.keep.scores._base import View, reduced, visible

SEES = "queries"


def score(view: View) -> torch.Tensor:
    settings, entries = view.spec.settings, view.k.shape[2]
    if entries > settings["long"]:
        few = max(1, round(settings["long_share"] * entries))
        view = replace(view, q=view.q[:, :, -few:], rows=view.rows[-few:])
    if not settings["scaled"]:
        view = replace(view, scale=1.0, logits=None)
    if not settings["causal"]:
        view = replace(view, rows=torch.full_like(view.rows, entries - 1))
    best = reduced(view, (p.mean(1, keepdim=True) for _, p in visible(view))).expand(-1, view.k.shape[1], -1)
    threshold = view.table("threshold").to(best)
    return best / threshold if float(threshold) > 0 else best + 1
