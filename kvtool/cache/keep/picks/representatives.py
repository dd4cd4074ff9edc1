"""Most of the best, and some of the others, chosen to be unlike one another (KVCrush: Jha et al., arXiv 2503.00022).

    bit_h(j) = 1 if entry j is in the upper half of head h's scores;   d_j = how many bits differ from the anchor's
    m = [share · (count − what always stays)] of the entries left are taken, evenly spaced along their order by d

Settings: `share`; `anchor` "alternate" (0, 1, 0, …), "zeros", "ones", "random" (by `Select.seed`) or "mean" (each bit's
majority); `spacing` "linspace" (both ends of the order included) or "step" (every ⌊left / m⌋th, from the first). Equal
distances stand in order of place.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks import _base
from kvtool.cache.keep.picks._base import Choice

RAGGED = False


def pick(choice: Choice) -> torch.Tensor:
    held = choice.scores.shape[2]
    always = held - len(range(*choice.free.indices(held)))
    some = round(choice.view.spec.settings["share"] * max(0, choice.count - always))
    best = _base.best(choice.scores, choice.count - some, choice.free)
    if not some:
        return best
    left = torch.ones_like(choice.scores, dtype=torch.bool).scatter(2, best, False)
    distance = distances(choice)[:, None].expand_as(choice.scores)
    order = torch.argsort(distance.masked_fill(~left, distance.max() + 1), dim=-1, stable=True)
    found = order[..., spaced(held - best.shape[2], some, choice.view.spec.settings["spacing"])]
    return torch.cat([best, found], -1).sort(-1).values


def distances(choice: Choice) -> torch.Tensor:
    """Of every entry's signature from the anchor, int64 [B,S]."""
    bits, heads = signatures(choice.peers), choice.peers.shape[1]
    name = choice.view.spec.settings["anchor"]
    if name == "mean":
        anchor = bits.float().mean(2) >= 0.5
    else:
        draw = torch.Generator().manual_seed(choice.view.spec.seed)
        anchor = {
            "alternate": torch.arange(heads) % 2 == 1,
            "zeros": torch.zeros(heads, dtype=torch.bool),
            "ones": torch.ones(heads, dtype=torch.bool),
            "random": torch.rand(heads, generator=draw, dtype=torch.float32) < 0.5,
        }[name].to(bits.device)[None]
    return (bits != anchor[..., None]).sum(1)


def signatures(peers: torch.Tensor) -> torch.Tensor:
    """Scores [B,R,S] → bool [B,R,S]: is the entry in the upper half of the head's? The older of two equal ones is."""
    order = torch.argsort(peers, dim=-1, descending=True, stable=True)[..., : (peers.shape[2] + 1) // 2]
    return torch.zeros_like(peers, dtype=torch.bool).scatter(2, order, True)


def spaced(left: int, count: int, spacing: str) -> torch.Tensor:
    """`count` ranks among `left`."""
    if spacing == "step":
        return torch.arange(count) * max(1, left // count)
    return torch.linspace(0, left - 1, count, dtype=torch.float32).round().long()
