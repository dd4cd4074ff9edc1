"""SAQ: precision falls by steps with the age of a token.

Li, arXiv 2410.18441, on key/value caches shared by all query heads. Only its abstract was at hand, which promises a
gradual degradation of precision on the ground of KIVI: the bands and the way down are our inference.

    newest `recent` tokens raw | the next edges[0] at bits[0] | … | all older ones at the last of `bits`
    inside a band as kivi: keys in groups of g tokens of a channel, values in groups of g channels of a token

A block moves down when it leaves its band: low bits are cut off the codes, and the middle of what they leave open takes
their place, code' = code >> n, s' = 2ⁿ s, m' = m + s (2ⁿ − 1)/2. The error is then at most s'/2, and nothing drifts.
`mode=calibrated` deals bits to layers and bands by the attention that each layer pays at each distance: whichever band
loses most error per byte, mass · 4^−b, gets the next bit, until the bytes of `bits` are spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Store
from kvtool.statistics._base import bin_edges

STATISTICS = ("attention",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """bits: of each band, youngest first, never rising. edges: tokens of every band but the last; more are not heeded.
    group: as in kivi. recent: newest tokens that stay raw. block: tokens that move together. mode: fixed, or
    calibrated for bits by layer. reach: tokens of a sequence that mode=calibrated reckons with."""

    bits: tuple[int, ...] = (8, 4, 2)
    edges: tuple[int, ...] = (128, 512)
    group: int = 32
    recent: int = 128
    block: int = 128
    mode: Literal["fixed", "calibrated"] = "fixed"
    reach: int = 4096

    def __post_init__(self) -> None:
        at_least(1, self, "group", "block", "reach")
        falling = all(a >= b for a, b in zip(self.bits, self.bits[1:], strict=False))
        if len(self.edges) < len(self.bits) - 1 or not falling:
            raise InputError(
                "bad bands", got=f"bits {list(self.bits)}, edges {list(self.edges)}",
                expected="bits that never rise, and an edge between any two",
            )  # fmt: skip


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    """As kivi counts: b + 1 of 16 bits for the many old tokens, twice the bits before them."""
    last = min(8, max(1, round(16 * budget - 1.5)))
    return {"bits": (min(8, 2 * last), last), "edges": (128,)}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    bits = torch.tensor(options.bits).expand(g.layers, -1)
    mass, edges = None, options.edges[: len(options.bits) - 1]
    if options.mode == "calibrated":
        mass = _mass(context, options, edges)
        bits = dealt(mass, _spans(options, edges), options.bits)
    store: Store | None = None
    for band in reversed(range(len(options.bits))):
        used = sorted(set(bits[:, band].tolist()))
        index = torch.tensor([used.index(width) for width in bits[:, band].tolist()], dtype=torch.int32)
        keys = tuple(Encoding(Affine(width, options.group, "token")) for width in used)
        values = tuple(Encoding(Affine(width, options.group, "channel")) for width in used)
        held = edges[band] if band < len(edges) else 0
        store = Store(
            keys, values, index[:, None].repeat(1, g.kv_heads), 0, options.recent, options.block, held=held, older=store
        )  # fmt: skip
    evidence = {} if mass is None else {"mass": mass.float(), "bits": bits.to(torch.uint8)}
    return Decision(store=store, evidence=evidence)


def _spans(options: Options, edges: tuple[int, ...]) -> torch.Tensor:
    """Tokens of each band in a sequence of `reach`."""
    young = options.recent + sum(edges)
    return torch.tensor([*edges, max(options.reach - young, options.block)])


def _mass(context: Context, options: Options, edges: tuple[int, ...]) -> torch.Tensor:
    """Attention that each layer pays each band, fp64 [L,bands], by the bins of distance that begin in it."""
    distance = context.seen["attention"]["distance"].sum(1)  # [L,bins]
    borders = torch.tensor([options.recent, *edges]).cumsum(0)
    band = torch.searchsorted(borders, torch.tensor(bin_edges()), right=True) - 1
    total = distance.sum(-1, keepdim=True).clamp_min(1e-12)
    each = [(distance * (band == number)).sum(-1, keepdim=True) for number in range(len(options.bits))]
    return torch.cat(each, dim=-1) / total


def dealt(mass: torch.Tensor, spans: torch.Tensor, bits: tuple[int, ...]) -> torch.Tensor:
    """Bits int64 [L,bands], never rising with age, for attention mass [L,bands] and `spans` tokens a band, that cost no
    more than `bits` in every layer."""
    budget = len(mass) * int((torch.tensor(bits) * spans).sum())
    made = torch.ones(mass.shape, dtype=torch.int64)
    while True:
        gain = mass * (4.0**-made - 4.0 ** -(made + 1.0)) / spans
        younger = torch.nn.functional.pad(made[:, :-1], (1, 0), value=8)
        left = budget - int((made * spans).sum())
        gain = gain.masked_fill((made >= younger) | (spans > left), -1.0)
        if bool((gain < 0).all()):
            return made
        made.view(-1)[gain.argmax()] += 1
