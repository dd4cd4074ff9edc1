"""How evenly a window of queries looks at the blocks before it, per layer: ActQKV's measure of what a layer needs.

    probe p = Σ_t w_t q_t over the last `ASKED` queries before RoPE, weighted by how much they differ from those so far
    r_u = mean of the `KEYS` keys of block u, before RoPE, that were attended most while they were among the last R
    s_u = cos(p, r_u) over all query heads at once;   E = −Σ_u a_u ln a_u / ln U,  a = softmax s

(arXiv 2502.13542; `kvtool/cache/read/asking.py` and `…/credits.py` do the same for a cache.) Windows end at the last
token of a text, and every `ASKED` tokens before in its second half; blocks are of `UNIT` tokens, those that end R
before the window does, with R = `REACH`, a quarter of the text at most. `entropy` [L] sums E over windows, `windows`
[1] counts them. Cosines lie between −1 and 1, so that their softmax is nearly even: E is close to 1 and layers differ
little. Layers with a sliding window of their own are left out.
"""

from __future__ import annotations

import math

import torch

from kvtool.cache.lane import Step
from kvtool.cache.read.asking import weights
from kvtool.cache.read.credits import credited
from kvtool.cache.read.summaries import attended
from kvtool.cache.read.summaries._base import Given
from kvtool.statistics._base import States, Statistic

ASKED, KEYS, UNIT, REACH = 32, 4, 8, 64


class BlockEntropy(Statistic):
    default = False

    def zero(self) -> None:
        self.add("entropy", self.geometry.layers)
        self.add("windows", 1)

    def states(self, view: States) -> None:
        tokens = view.k.shape[1]
        reach = min(REACH, tokens // 4)
        ends = [end for end in range(tokens, tokens // 2, -ASKED) if (end - reach) // UNIT > 1]
        if view.layer == 0:
            self["windows"] += len(ends)
        if self.geometry.windows[view.layer] is not None or not ends:
            return
        bare = view.rotary.unrotate(view.q, view.table).float().unflatten(0, (len(view.k), -1))
        blocks = representatives(view, reach)
        for end in ends:
            probe = probed(bare[:, :, :end])
            self["entropy"][view.layer] += evenness(probe, blocks[:, : (end - reach) // UNIT])


def representatives(view: States, reach: int) -> torch.Tensor:
    """[K,U,D] of all whole blocks of a text."""
    step = Step(0, view.scale, view.softcap)
    q = view.q.float().unflatten(0, (len(view.k), -1))
    credit = credited(q[None], view.k.float()[None], reach, step)
    whole = view.k.shape[1] // UNIT * UNIT
    keys = view.k_pre.float()[None, :, :whole].unflatten(2, (-1, UNIT))
    given = Given(rank=KEYS, credit=credit[:, :, :whole].unflatten(2, (-1, UNIT)))
    return attended.summarise(keys, given)[0][0]


def probed(q: torch.Tensor) -> torch.Tensor:
    """q [K,G,T,D] of all tokens so far → the probe of the last of them, [K,G,D]."""
    share = weights(q[None, :, :, -ASKED:], q.mean(2), q.var(2, correction=0))
    return (share[0, None, None, :, None] * q[:, :, -ASKED:]).sum(2)


def evenness(probe: torch.Tensor, blocks: torch.Tensor) -> float:
    """probe [K,G,D], blocks [K,U,D] → E."""
    products = torch.einsum("kgd,kud->u", probe, blocks)
    lengths = (probe.shape[1] * blocks.square().sum((0, 2))).sqrt() * probe.norm()
    share = (products / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).double().softmax(0)
    return float(torch.special.entr(share).sum()) / math.log(len(share))
