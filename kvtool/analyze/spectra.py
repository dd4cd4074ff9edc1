"""How many dimensions keys and values use: spectra, effective ranks, ranks by energy, truncated entropy.

λ are the eigenvalues of a second-moment matrix Σ x xᵀ, p = λ / Σ λ; the singular values of the stacked tokens
are √λ, given here divided by √T, so that they do not grow with the number of tokens.

    effective rank   exp(−Σ p ln p)
    rank at s        the least r whose top r eigenvalues hold the share s of Σ λ; s = 0.90, 0.95, 0.99
    centred rank     the same without the mean (needs `channels` of the same tokens): a constant offset, which
                     keys before RoPE have, passes for a low rank
    entropy          −Σ_{i ≤ 32} p_i ln p_i / ln D of the queries (UNComp, arXiv 2410.03090): low = compress

`joint`: all C = K·D channels of a layer, keys before RoPE and values (what one basis of a layer spans).
`heads`: the D channels of each KV head, keys before and after RoPE and values.

UNComp centres its queries and normalises rows; the second moments of a group's pooled queries allow neither:
these entropies order heads but are not the paper's numbers. Cut at 32, they fall again for flat spectra.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import Cell, Finding, cell, observed, plain, shown
from kvtool.analyze._ranks import blocks, effective_rank, eigenvalues, energy_rank, truncated_entropy
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("gram",)
SHARES = (0.90, 0.95, 0.99)
LABELS = {"k_pre": "keys before RoPE", "k": "keys after RoPE", "v": "values"}
COLUMNS = (
    "layer", "K eff", "K 90/95/99", "K−mean 90", "V eff", "V 90/95/99",
    "K pre/h 90", "K/h 90", "V/h 90", "Q ent",
)  # fmt: skip

Spectra = dict[str, torch.Tensor]


def find(trace: Trace) -> Finding:
    statistic, tokens = observed(trace, "gram", "tokens")
    g = trace.geometry
    gram = {kind: statistic[kind] / tokens for kind in ("k_pre", "k", "v", "q")}
    joint = {kind: eigenvalues(gram[kind]) for kind in ("k_pre", "v")}  # [L,C]
    per_head = {
        "k_pre": blocks(gram["k_pre"], g.kv_heads),
        "k": gram["k"],
        "v": blocks(gram["v"], g.kv_heads),
    }
    heads = {kind: eigenvalues(values) for kind, values in per_head.items()}  # [L,K,D]
    centred = {kind: _centred_rank(trace, gram[kind], kind, tokens) for kind in joint}  # [L]
    entropy = truncated_entropy(eigenvalues(gram["q"]), g.head_dim)  # [L,K]
    data = {
        "joint": {kind: _summary(values) | {"centred_rank_90": plain(centred[kind])} for kind, values in joint.items()},
        "heads": {kind: _summary(values) for kind, values in heads.items()},
        "query_entropy": plain(entropy),
        "width": {"joint": g.kv_heads * g.head_dim, "heads": g.head_dim},
    }
    lines: list[tuple[Cell, list[int]]] = [(layer, [layer]) for layer in shown(g.layers)]
    lines.append(("mean", list(range(g.layers))))
    rows = [_row(name, chosen, joint, heads, centred, entropy) for name, chosen in lines]
    ranks = {kind: energy_rank(values, SHARES[0]).mean(1) for kind, values in heads.items()}
    figures = {
        "spectra-curves": partial(_curves, joint["k_pre"], heads["k"].mean(1), joint["v"]),
        "spectra-ranks": partial(_ranks, ranks, g.head_dim),
    }
    return Finding("spectra", _headline(joint, ranks, centred, g.head_dim), COLUMNS, rows, data, figures)


def _centred_rank(trace: Trace, gram: torch.Tensor, kind: str, tokens: float) -> torch.Tensor:
    """Rank at 90 % of gram − μ μᵀ [L,C,C]; NaN [L] unless the trace has the means of the same tokens."""
    if "channels" not in trace.statistics or float(trace["channels"]["tokens"]) != tokens:
        return torch.full((len(gram),), torch.nan)
    mean = trace["channels"][f"{kind}.sum"].flatten(1) / tokens
    return energy_rank(eigenvalues(gram - mean[:, :, None] * mean[:, None]), SHARES[0])


def _summary(values: torch.Tensor) -> dict[str, Any]:
    ranks = {f"rank_{share * 100:.0f}": plain(energy_rank(values, share).long()) for share in SHARES}
    return {
        "effective_rank": plain(effective_rank(values)),
        **ranks,
        "singular_values": plain(values.sqrt(), 4),
    }


def _row(
    name: Cell, layers: list[int], joint: Spectra, heads: Spectra, centred: Spectra, entropy: torch.Tensor
) -> tuple[Cell, ...]:
    """Means over `layers` (and KV heads)."""
    cells: list[Cell] = []
    for kind, values in joint.items():
        ranks = (str(cell(energy_rank(values[layers], share).mean(), 0)) for share in SHARES)
        cells += [cell(effective_rank(values[layers]).mean(), 1), "/".join(ranks)]
        if kind == "k_pre":
            cells.append(cell(centred[kind][layers].mean(), 0))
    cells += [cell(energy_rank(values[layers], SHARES[0]).mean(), 1) for values in heads.values()]
    return (name, *cells, cell(entropy[layers].mean()))


def _headline(joint: Spectra, ranks: Spectra, centred: Spectra, width: int) -> str:
    k, v = (float(energy_rank(values, SHARES[0]).mean()) for values in joint.values())
    bare = float(centred["k_pre"].mean())
    return (
        f"90 % of a layer's energy lies in {k:.0f} of {joint['v'].shape[-1]} dimensions of keys before RoPE"
        + (f" ({bare:.0f} without their mean)" if bare == bare else "")  # NaN: the means are not known
        + f" and in {v:.0f} of values; RoPE takes a head's keys from {float(ranks['k_pre'].mean()):.1f} "
        f"to {float(ranks['k'].mean()):.1f} of {width}."
    )


def _curves(k_pre: torch.Tensor, k: torch.Tensor, v: torch.Tensor, figure: Figure) -> None:
    """Singular values relative to the largest; λ [L,C], [L,D] (mean over heads), [L,C]."""
    axes = draw.panels(figure, 1, 3, draw.WIDE, 2.5, sharey=True)
    colours, last = draw.depth(len(v)), max(1, len(v) - 1)
    titles = ("keys before RoPE, all heads", "keys after RoPE, mean head", "values, all heads")
    for axis, values, title in zip(axes, (k_pre, k, v), titles, strict=True):
        relative = (values / values[:, :1].clamp_min(1e-300)).sqrt()
        for layer, line in enumerate(relative):
            axis.plot(torch.arange(1, len(line) + 1), line, color=colours(layer / last), linewidth=0.7)
        axis.set(title=title, xlabel="index i", yscale="log", xscale="log")
    axes[0].set(ylabel="singular value σᵢ / σ₁", ylim=(3e-4, 1.3))
    draw.depth_bar(figure, axes, len(v))


def _ranks(ranks: Spectra, width: int, figure: Figure) -> None:
    """Bars of the mean rank of a KV head, [L] by kind."""
    (axis,) = draw.panels(figure, 1, 1, draw.WIDE, 2.2)
    for index, (kind, values) in enumerate(ranks.items()):
        place = torch.arange(len(values)) + (index - 1) * 0.28
        axis.bar(place.numpy(), values.numpy(), 0.26, color=draw.FILLS[index], label=LABELS[kind])
    axis.set(xlabel="layer", ylabel=f"rank for 90 % energy (of {width})", xlim=(-0.7, len(ranks["v"]) - 0.3))
    axis.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    draw.whole(axis)
