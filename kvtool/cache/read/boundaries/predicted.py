"""A small network that reads the keys on both sides of a place, those of all KV heads concatenated, before RoPE.

    e_j = E · k_j;   l, r = Σ_j softmax_j(a · e_j) e_j over the w entries before the place, and from it on
    value = u · SiLU(W · [l; r; |l − r|; l ⊙ r; cos(l, r)] + c) + b, a logit

(DHSA, arXiv 2510.24606: a shared encoder that pools by attention, these features, an MLP.) It looks w entries ahead and
no further. Tables: `embed` [E,K·D], `pool` [E], `hidden` [M,4E+1], `shift` [M], `last` [M+1], whose last element is b.
"""

from __future__ import annotations

import torch

from kvtool.cache.read.prefills._base import Job
from kvtool.errors import InputError
from kvtool_kernels.precision import wide

Tables = dict[str, torch.Tensor]


def values(job: Job) -> torch.Tensor:
    """[B,N]; −inf where a side is not whole."""
    width = job.k.shape[1] * job.k.shape[3]
    tables = {name: table.to(job.k.device, wide(job.k).dtype) for name, table in job.spec.tables.items()}
    if tables["embed"].shape[1] != width:
        raise InputError(
            "boundaries are predicted from the keys of all heads", got=f"{width} channels that hold everything",
            expected=tables["embed"].shape[1], remedy="compose with a plan that treats the heads of a layer alike",
        )  # fmt: skip
    places = torch.arange(job.k.shape[2], device=job.k.device) + job.step.origin
    keys = wide(job.rotary.unrotate(job.k, job.rotary.table(places)))
    return logits(keys.transpose(1, 2).flatten(2), tables, job.spec.window)


def logits(keys: torch.Tensor, tables: Tables, window: int) -> torch.Tensor:
    """keys [B,N,C] → [B,N]."""
    entries = keys.shape[1]
    found = keys.new_full(keys.shape[:2], float("-inf"))
    if entries < 2 * window:
        return found
    seen = keys @ tables["embed"].T
    sides = seen.unfold(1, window, 1)  # [B,N−w+1,E,w]: the w entries from each on
    share = torch.softmax((seen @ tables["pool"]).unfold(1, window, 1), -1)
    pooled = (sides * share[:, :, None]).sum(-1)
    left, right = pooled[:, :-window], pooled[:, window:]
    cosine = torch.cosine_similarity(left, right, dim=-1)[..., None]
    read = torch.cat([left, right, (left - right).abs(), left * right, cosine], dim=-1)
    hidden = torch.nn.functional.silu(read @ tables["hidden"].T + tables["shift"])
    made = hidden @ tables["last"][:-1] + tables["last"][-1]
    return torch.cat([found[:, :window], made, found[:, entries - window + 1 :]], dim=1)
