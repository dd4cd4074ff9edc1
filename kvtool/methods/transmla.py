"""TransMLA: keys mixed across KV heads so that one head's width of components can carry RoPE for all; what is left of
them and the values become one latent.

Meng et al., arXiv 2502.07864, NeurIPS 2025, with its released code (v3).

    per pair of channels: U over heads from Σ z z*, z_h = k_{h,a} + i k_{h,b} (RoRoPE);   rope head: U's first rows
    c = [k⁰·U_rest / ratio | v]·R_r,  ratio = mean‖k⁰·U_rest‖ / mean‖v‖;   held: [rope head | c], for all heads at once
    logit = q·k_rope + q⁰·k̂⁰;   out = Σ w c R_v;   memory 16·(ρ + r)/2C bits a number

Mixing across heads does not disturb RoPE, so that the rope head is exact. The other components lose RoPE, whatever the
rank: k⁰ and q⁰ stand at position 0, and that is where the method departs from the model. R_r are the principal
directions of keys and values together. Nothing is rebuilt: queries and outputs take the matrices. A budget too short
for twice the rope head gives half of it to the rope head's strongest components.

`form=roped` is ours: all components that are kept keep RoPE, the strongest of all; keys and values have a latent each,
nothing departs at full rank. Either form says what the other would cost: relative changes of the attention output on
texts that nothing was fitted to. `phase`, ours too, lets U be complex, which commutes with RoPE as well and never holds
less. The budget is dealt to layers (published: all alike), in the second form to sides as well, by the least sum of
dropped shares. Raw entries keep RoPE.

Not here: folding of neighbouring frequencies into one (freqfold, collapse), which is inexact; the weights, which stay
as they are, so that queries are not rescaled; the healing by training that published numbers at short latents need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods import _ranks, _roped, _training
from kvtool.methods._base import Context, Decision
from kvtool.methods._prompts import texts
from kvtool.methods._roped import Latent, Mixed
from kvtool.options import at_least

STATISTICS = ("gram",)
MODEL = True


@dataclass(frozen=True)
class Options:
    """budget: share of the bytes of 16-bit keys and values that components and latents take. form: latent, a rope head
    and one latent for the rest of keys and for values (published), or roped, whose keys all keep RoPE. rope: heads'
    widths that the rope head takes, at most. balance: how long the rest of keys is, relative to values, when their
    directions are found. phase: heads are mixed with complex weights, or with one real matrix for both halves
    (published). samples, tokens: texts and their length that the latent is fitted to. checked: further texts that
    losses are measured on; none with 0. sink: first entries that stay raw. recent: newest entries that stay raw.
    block: entries that leave the raw window together."""

    budget: float = 0.5
    form: Literal["latent", "roped"] = "latent"
    rope: int = 1
    balance: float = 1.0
    phase: bool = False
    samples: int = 16
    tokens: int = 256
    checked: int = 1
    sink: int = 0
    recent: int = 0
    block: int = 32

    def __post_init__(self) -> None:
        at_least(1, self, "block", "samples", "rope")
        at_least(0, self, "sink", "recent", "checked")
        if self.form not in ("latent", "roped"):
            raise InputError("bad option form", got=self.form, expected="latent or roped")
        if not 0 < self.budget <= 1:
            raise InputError("bad option budget", got=self.budget, expected="a share, more than 0")
        if not self.balance > 0:
            raise InputError("bad option balance", got=self.balance, expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g, chosen = context.geometry, _training.whole(context.geometry)
    layers = [_layer(context, layer, options) for layer in chosen]
    read = texts(context, samples=options.samples + options.checked, tokens=options.tokens)
    joint = _joint(context, options, layers, read[: options.samples])
    forms = {"latent": _latents(layers, joint, options.budget), "roped": _apart(layers, options.budget)}
    if options.form == "latent":
        each = zip(chosen, layers, joint, forms["latent"].tolist(), strict=True)
        pairs = {number: layer.pair(basis, rank, g.kv_heads) for number, layer, basis, rank in each}
    else:
        bases = ([layer.keys[None] for layer in layers], [layer.values[None] for layer in layers])
        pairs = _ranks.projected(chosen, bases, forms["roped"], g.kv_heads, rotated=True)
    store = _ranks.store(g, pairs, sink=options.sink, recent=options.recent, block=options.block)
    found = {"rope_share": torch.tensor([layer.rope_share for layer in layers])}
    for name in ("energy", "apart"):
        dropped = [_ranks.left(getattr(basis, name))[rank] for basis, rank in zip(joint, forms["latent"], strict=True)]
        found["joint_dropped" if name == "energy" else "apart_dropped"] = torch.stack(dropped).float()
    if options.checked:
        found |= measured(context, layers, joint, forms, read[options.samples :])
    held = forms["roped"].sum(1) if options.form == "roped" else forms["latent"] + _widths(layers)
    facts = {"held": float(held.double().mean()) / (2 * g.kv_heads * g.head_dim)}
    return Decision(
        store=store, evidence={"ranks": forms[options.form].int(), **found},
        facts=facts | {name: float(each.mean()) for name, each in found.items()},
    )  # fmt: skip


def _layer(context: Context, number: int, options: Options) -> Mixed:
    g, rotary = context.geometry, context.running.rotary(number)
    keys, values = (gram[number, 0] for gram in _ranks.moments(context.seen, g.kv_heads, g.kv_heads))
    energy, columns = _roped.components(keys, rotary, g.kv_heads, phase=options.phase)
    rope = _roped.leading(rotary, g.kv_heads, len(energy), options.rope)
    order = energy.argsort(descending=True, stable=True)
    rope = rope[order] & (rope[order].cumsum(0) <= max(1, int(options.budget * len(keys) / 2)))
    energy, columns = energy[order], columns.unflatten(1, (-1, 2))[:, order].flatten(1)
    value_energy, basis = _ranks.principal(values)
    dropped = torch.stack([_ranks.left(energy.repeat_interleave(2) / 2), _ranks.left(value_energy)])
    share = float(energy[rope].sum() / energy.sum().clamp_min(1e-300))
    return Mixed(columns, rope.repeat_interleave(2), share, basis, dropped)


def _joint(context: Context, options: Options, layers: list[Mixed], read: Sequence[Sample]) -> list[Latent]:
    """Each layer's latent, fitted to these texts."""
    chosen, width = _training.whole(context.geometry), len(layers[0].keys)
    gram, norms = torch.zeros(len(layers), 2 * width, 2 * width).double(), torch.zeros(len(layers), 2).double()
    for done, sample in enumerate(read, 1):
        seen = _training.states(context.running, sample)
        for at, (number, layer) in enumerate(zip(chosen, layers, strict=True)):
            keys, values = (_roped.flat(x).cpu() for x in (_roped.still(seen[number], seen[number].k), seen[number].v))
            both = torch.cat([keys, values], 1)
            gram[at] += both.T @ both / len(read)
            rest = keys @ layer.keys[:, ~layer.rope]
            norms[at] += torch.stack([rest.norm(dim=1).mean(), values.norm(dim=1).mean()])
        context.progress(done, len(read), "latent")
    rests = (layer.keys[:, ~layer.rope] for layer in layers)
    return [_roped.latent(*each, options.balance) for each in zip(rests, gram, norms, strict=True)]


def _widths(layers: list[Mixed]) -> torch.Tensor:
    return torch.tensor([int(layer.rope.sum()) for layer in layers])


def _latents(layers: list[Mixed], joint: list[Latent], budget: float) -> torch.Tensor:
    """r of each layer, int64 [N], so that rope heads and latents take the budget."""
    whole = 2 * len(layers[0].keys)
    steps = round((budget * whole * len(layers) - int(_widths(layers).sum())) / 2)
    dropped = torch.zeros(len(layers), whole + 1).double()
    for row, each in zip(dropped, joint, strict=True):  # directions that a layer does not have would make it worse
        count = len(each.energy)
        row[: count + 1], row[count:] = _ranks.left(each.energy), torch.arange(whole + 1 - count)
    return 2 * _ranks.greedy(dropped, max(len(layers), steps), 2)


def _apart(layers: list[Mixed], budget: float) -> torch.Tensor:
    """Ranks of each layer's keys and values, int64 [N,2]."""
    steps, step = _ranks.units(budget, len(layers[0].keys), 2, 2 * len(layers))
    dealt = _ranks.greedy(torch.stack([layer.dropped for layer in layers]).flatten(0, 1), steps, step)
    return step * dealt.reshape(-1, 2)


def measured(
    context: Context, layers: list[Mixed], joint: list[Latent], forms: dict[str, torch.Tensor], read: Sequence[Sample]
) -> dict[str, torch.Tensor]:
    """Means over texts of each layer's relative change of the attention output, fp32 [N] each."""
    model, chosen = context.running, _training.whole(context.geometry)
    found = torch.zeros(3, len(layers))
    for done, sample in enumerate(read, 1):
        seen = _training.states(model, sample)
        for at, (number, layer) in enumerate(zip(chosen, layers, strict=True)):
            view, weight = seen[number], model.output_projection(number)
            variants = (
                layer.without_rope(view), layer.without_rope(view, joint[at], int(forms["latent"][at])),
                layer.kept(view, forms["roped"][at]),
            )  # fmt: skip
            found[:, at] += torch.tensor([_ranks.output_change(view, *states, weight) for states in variants])
        context.progress(done, len(read), "losses")
    return dict(zip(("nope_error", "latent_error", "roped_error"), found / len(read), strict=True))
