"""A mixture of attention received, the entropy of the entry's own row, and how the entry moves the newest output.

    s = w_a · m(Σ_i p_ij) + w_e · E_j + w_g · m(‖∂ℓ/∂k_j‖₁ + ‖∂ℓ/∂v_j‖₁)      m: to 0 … 1 over the entries
    E_j = m(−Σ_j p_ji ln p_ji / ln t_j)      of entry j's own row, if it is observed; else 0;   t_j entries that it sees
    ℓ = mean_c (o_c − o'_c)²      outputs of one query head for the newest query and the one before

The terms are scaled after they are summed over all query heads of the lane; gradients in closed form are in
`kvtool_kernels/mixing.py`. A decode step observes one query: o' is then what the step before made of what it held, and
of one entropy, which is between 0 and 1 as it is, there is nothing to scale. The first step has no output before it,
and that term is 0. (CRITIC: arXiv 2504.01281; partly reconstructed.) [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View, hot
from kvtool_kernels.attend.reference import logits
from kvtool_kernels.mixing import Mix, mixed, moved, scaled
from kvtool_kernels.precision import wide

SEES = "queries"
RECALLS = True  # every step's output, for the next


def score(view: View) -> torch.Tensor:
    heads = view.q.shape[1]
    if len(view.rows) == 1:
        return _newest(view).expand(-1, heads, -1)
    received, entropy, change = wide(view.k).new_zeros(3, len(view.k), view.k.shape[2])
    made = [_look(view.alone(head), received, entropy, change) for head in range(view.k.shape[1])]
    if view.turn:
        view.memory["output"] = torch.cat(made, 1)
    weights = view.spec.settings
    total = weights["attention"] * scaled(received) + weights["entropy"] * scaled(entropy / heads)
    total = total + weights["gradient"] * scaled(change)
    return total[:, None].expand(-1, heads, -1)


def blend(view: View) -> Mix:
    """What a decode step's score mixes."""
    return Mix(**view.spec.settings, before=view.memory.get("output"))


def _newest(view: View) -> torch.Tensor:
    """[B,1,S], of one observed query, the newest, whose output is remembered if it is a decode step's."""
    ((_, seen),) = hot(view)
    p = torch.softmax(seen, -1)
    mix, out = blend(view), _made(view, p)
    if view.turn:
        view.memory["output"] = out
    return mixed(mix, p[:, :, 0], seen[:, :, 0], view.q, view.v, out, scale=view.scale, softcap=view.softcap)


def _look(view: View, received: torch.Tensor, entropy: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """What one KV head's entries are paid, how widely their own rows looked, in sum, and what they move: added to the
    three [B,S]; the newest query's output [B,G,1,D]."""
    newest: list[torch.Tensor] = []
    for rows, seen in hot(view):
        p = torch.softmax(seen, -1)
        highest, place = p.max(-1, keepdim=True)
        size = seen.gather(-1, place) - highest.log()  # log Σ exp
        seen[..., int(rows[0]) + 1 :].clamp_min_(-1e30)  # nothing is paid to what is not seen
        widely = size[..., 0] - torch.linalg.vecdot(p, seen)
        received[:, : p.shape[-1]] += p.sum((1, 2))
        entropy[:, rows] += widely.sum(1) / (rows + 1).to(p.dtype).log().clamp_min(1e-30)
        last = torch.nn.functional.pad(p[:, :, -2:], (0, view.k.shape[2] - p.shape[-1]))
        newest = [*newest, *last.unbind(2)][-2:]
    p = torch.stack(newest, 2)
    before, now = _made(view, p).split(1, 2)
    q, v = view.q[:, :, -1:], view.v
    seen = logits(q, view.k, scale=view.scale, softcap=view.softcap)[:, :, 0]
    change += moved(p[:, :, 1], seen, q, v, now, before, scale=view.scale, softcap=view.softcap).sum(1)
    return now


def _made(view: View, p: torch.Tensor) -> torch.Tensor:
    """p [B,H,N,≤S] → the outputs [B,H,N,D]."""
    values = wide(view.v)[:, :, : p.shape[-1]]  # a group's queries together: values are not repeated
    together = p.unflatten(1, (values.shape[1], -1)).flatten(2, 3)
    return (together @ values).unflatten(2, (-1, p.shape[2])).flatten(1, 2)
