"""CSKV: a low-rank branch for all but the newest tokens, begun by ASVD and trained to rebuild keys and values.

Wang et al., arXiv 2409.10593, with its released code.

    a_i = mean |x_i| over layer inputs, S = diag(a + ε)^½;   S W = U Σ Vᵀ;   k̂ = k·V_ρ V_ρᵀ to begin with
    z = k·A,  k̂ = z·B,  RoPE after;   loss = Σ_layers ‖k − k̂‖²/‖k‖² + ‖v − v̂‖²/‖v‖²;   AdamW on A and B alone
    memory: 16·ρ/C bits a number, or b·ρ/C and ranges: 32 entries of a latent's channel share one in keys, all channels
    of an entry's latent in values; the newest entries in full

The published latent is a function of the layer's input x, ours of the key k = x W itself. Nothing is lost. ASVD's first
latent is x·S⁻¹ U Σ^½ = x W V Σ^-½, one of k already. And no k̂ of rank ρ, whatever it is a function of, has less loss
than k P, P the projection on the first ρ principal directions of Σ k kᵀ (Eckart and Young). That is `bound` in the
evidence, beside the losses at `start` and `end`: without codes training approaches it and cannot pass it, so that
start=pca leaves nothing to train. With `bits` below 16 the loss is that of the codes, through which gradients pass
straight, and training has something to gain. What it makes worse stays as it began, layer by layer and side by side.

W is read off x and k by least squares, so that no weight is known by name. Departures: a layer's loss is divided by
its energy, so that loud layers do not take all of the training; steps, batch and rate are for a few texts instead of
256 of 4,096 tokens (lr 5e-5, one epoch); tokens wait for their code exact only, not exact and coded both, and `recent`
always stay, with `block` more (released: 0 to 31 tokens; recent=0 gives that). A window is exact while it is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.encoding.codecs import Affine, Codec
from kvtool.errors import InputError
from kvtool.methods import _branch, _ranks
from kvtool.methods._base import Context, Decision, share
from kvtool.methods._branch import SIDES, WINDOW
from kvtool.methods._prompts import texts
from kvtool.methods._training import whole
from kvtool.options import at_least

STATISTICS = ()
MODEL = True

RAW = 0.048


@dataclass(frozen=True)
class Options:
    """budget: share of the bytes of 16-bit keys and values that latents take. key_share: of that, for keys. bits: of a
    latent's numbers, 1 to 8, or 16 for latents as they are. start: asvd, or pca for the bound itself. steps: optimiser
    steps. lr: learning rate, of numbers that begin at about 1/√C. samples, tokens: training texts and their length.
    sink: first entries that stay raw. recent: newest entries that stay raw. block: entries that leave the raw window
    together."""

    budget: float = 0.5
    key_share: float = 0.5
    bits: int = 16
    start: Literal["asvd", "pca"] = "asvd"
    steps: int = 200
    lr: float = 1e-3
    samples: int = 8
    tokens: int = 512
    sink: int = 0
    recent: int = 32
    block: int = 32

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "block", "steps")
        at_least(0, self, "sink", "recent")
        share(self.key_share, "key_share")
        _ranks.check_bits(self.bits, 8)
        if not 0 < self.budget <= 1:
            raise InputError("bad option budget", got=self.budget, expected="a share, more than 0")

    def ranks(self, width: int) -> tuple[int, int]:
        """Of keys and of values, 1 to `width`; in codes, multiples of 8, or all."""
        whole = self.budget * 2 * _ranks.SIXTEEN / self.bits
        step = 1 if self.bits == _ranks.SIXTEEN else 8
        keys, values = (
            min(width, max(1, round(part * whole * width / step)) * step)
            for part in (self.key_share, 1 - self.key_share)
        )
        return keys, values


def at(budget: float) -> dict[str, Any]:
    """Latents beside the raw entries of a prompt of 1,000 tokens, 48 on average."""
    return {"budget": max(0.01, (budget - RAW) / (1 - RAW))}


def calibrate(context: Context, options: Options) -> Decision:
    g, layers = context.geometry, whole(context.geometry)
    read = texts(context, samples=options.samples, tokens=options.tokens)
    width, coded = g.kv_heads * g.head_dim, options.bits < _ranks.SIXTEEN
    ranks, seen = options.ranks(width), _branch.observed(context, read, layers)
    codecs = {side: codec(side, rank, options.bits) for side, rank in zip(SIDES, ranks, strict=True)}
    start, bound = _branch.begun(seen, ranks, asvd=options.start == "asvd", mixed=coded)
    tensors, history, ends = _branch.trained(context, seen, start, codecs, steps=options.steps, lr=options.lr)
    pairs = {}
    for at, layer in enumerate(layers):
        keys, values = (
            _ranks.latent(down[at : at + 1], up[at : at + 1], g.kv_heads, codec=codecs[side], rotated=side == "values")
            for side, down, up in ((side, tensors[f"{side}.down"], tensors[f"{side}.up"]) for side in SIDES)
        )
        pairs[layer] = (keys, values)
    store = _ranks.store(g, pairs, sink=options.sink, recent=options.recent, block=options.block)
    losses = {**ends, "bound": bound}
    facts = {"steps": len(history), "key_rank": ranks[0] / width, "value_rank": ranks[1] / width}
    means = {name: float(each.mean()) for name, each in losses.items()}
    return Decision(store=store, evidence={**losses, "loss": history}, facts={**facts, **means})


def codec(side: str, rank: int, bits: int) -> Codec | None:
    """Keys' ranges run along 32 entries, values' along the latent."""
    if bits == _ranks.SIXTEEN:
        return None
    return Affine(bits, WINDOW, "token") if side == "keys" else Affine(bits, rank, "channel")
