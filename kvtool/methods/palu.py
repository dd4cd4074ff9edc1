"""Palu: keys before RoPE and values of neighbouring heads as one low-rank latent, more of it where the loss feels it.

Chang et al., arXiv 2407.21118, ICLR 2025, sections 3 and 4, with its released code.

    W_g S = U Σ Vᵀ,  S Sᵀ = Σ x xᵀ over layer inputs;   Ŵ_g = U_r U_rᵀ W_g;   z = U_rᵀ k_g,  k̂_g = U_r z,  RoPE after
    rank of a layer's side ∝ F = mean √(mean (∂loss/∂W)²);   16·r/n bits a number, or b·r/n + 32/n: n = |g|·D

The whitened decomposition of W truncates ‖(W − Ŵ) S‖² = Σ ‖k − k̂‖², and its left factor U holds the eigenvectors of
W S Sᵀ Wᵀ = Σ k kᵀ. So the released basis is the principal basis of the keys themselves, and that is how it is found
here: from the Gram matrix of keys before RoPE and of values, without Cholesky factors, and after whatever stands
between projection and key, such as a norm of keys, where whitening the projection would miss it. The latent is a linear
function of k either way.

`ranks` deals the budget to each layer's keys and values, evenly over their groups: fisher (released), uniform
(released), or energy, which is ours: the least sum of dropped shares of energy. Fused mixing spreads a latent over its
channels before codes are made: a Hadamard transform for the powers of two in r, cosines for the rest (released: ranks
that have a Hadamard matrix). Departures: ranks are multiples of 8, not 32; the last group is not smaller, so a group
has as many heads as divide K; a bias of the projection is part of what the basis must hold, not added after it (it
takes one rank at most); keys are rebuilt once a KV head, not once a query head, at their own stored positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods import _ranks
from kvtool.methods._base import Context, Decision
from kvtool.methods._gradients import fisher
from kvtool.methods._prompts import texts
from kvtool.methods._training import whole
from kvtool.options import at_least

STATISTICS = ("gram",)
MODEL = True


@dataclass(frozen=True)
class Options:
    """budget: share of the bytes of 16-bit keys and values that latents take. group_heads: neighbouring heads that
    share a latent, at most. ranks: how the budget is dealt to layers and to keys and values: fisher, energy or uniform.
    bits: of a latent's numbers, 1 to 8, or 16 for latents as they are. multiple: of which ranks are. samples, tokens:
    texts and their length that ranks=fisher takes gradients of. sink: first entries that stay raw. recent: newest
    entries that stay raw. block: entries that leave the raw window together."""

    budget: float = 0.5
    group_heads: int = 4
    ranks: Literal["fisher", "energy", "uniform"] = "fisher"
    bits: int = 16
    multiple: int = 8
    samples: int = 4
    tokens: int = 256
    sink: int = 0
    recent: int = 0
    block: int = 32

    def __post_init__(self) -> None:
        at_least(1, self, "group_heads", "multiple", "samples", "block")
        at_least(0, self, "sink", "recent")
        _ranks.check_bits(self.bits, self.multiple)
        if not 0 < self.budget <= 1:
            raise InputError("bad option budget", got=self.budget, expected="a share, more than 0")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g, layers = context.geometry, whole(context.geometry)
    count = _ranks.neighbours(g.kv_heads, options.group_heads)
    width = count * g.head_dim
    found = [_ranks.principal(gram[layers]) for gram in _ranks.moments(context.seen, g.kv_heads, count)]
    energy, bases = [each[0] for each in found], [each[1] for each in found]  # keys', values': [N,K/count,n,…]
    share = min(1.0, options.budget * _ranks.SIXTEEN / options.bits)
    steps, step = _ranks.units(share, width, options.multiple, 2 * len(layers))
    evidence = {"key_energy": energy[0].float(), "value_energy": energy[1].float()}
    if options.ranks == "energy":
        dropped = torch.stack([_ranks.left(each).mean(1) for each in energy], 1)  # [N,2,n+1]
        dealt = _ranks.greedy(dropped.flatten(0, 1), steps, step)
    else:
        felt = torch.ones(len(layers), 2, dtype=torch.float64)
        if options.ranks == "fisher":
            felt = _felt(context, options)[layers]
            evidence["fisher"] = felt.float()
        dealt = _ranks.proportional(felt.flatten(), steps, width // step)
    ranks = step * dealt.reshape(-1, 2)
    pairs = _ranks.projected(layers, bases, ranks, count, bits=options.bits)
    store = _ranks.store(g, pairs, sink=options.sink, recent=options.recent, block=options.block)
    evidence["ranks"] = ranks.int()
    return Decision(store=store, evidence=evidence, facts={"heads": count, **_ranks.facts(energy, ranks, width)})


def _felt(context: Context, options: Options) -> torch.Tensor:
    made = texts(context, samples=options.samples, tokens=options.tokens)
    return fisher(context.running, made, context.progress)
