"""A low-rank branch beside keys and values: what it is trained on, where it begins, its loss, and the training.

    z = x·A,  x̂ = z·B;   loss = Σ_layers ‖x − x̂‖²/‖x‖², x the keys before RoPE, and the values;   AdamW on A and B alone

Codes of z, where there are any, are those of the cache: gradients pass straight through them. It knows no method.
Shapes: N layers, T training tokens, C = K·D, ρ ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvtool.corpus.base import Sample
from kvtool.encoding.codecs import Codec
from kvtool.methods import _ranks, _training
from kvtool.methods._base import Context
from kvtool.methods._gradients import inputs
from kvtool.methods._training import Tensors, Trainer

BATCH = 512  # tokens of a step, in whole windows
WINDOW = 32  # entries of a latent's channel that may share a range
SIDES = ("keys", "values")
CLIP = 1.0
Codecs = Mapping[str, Codec | None]


@dataclass(frozen=True)
class Seen:
    """Keys before RoPE and values, fp32 [N,T,C], and Wᵀ diag(a) W of each, fp64 [N,C,C], a = mean |input|."""

    x: tuple[torch.Tensor, torch.Tensor]
    asvd: tuple[torch.Tensor, torch.Tensor]


def observed(context: Context, samples: Sequence[Sample], layers: list[int]) -> Seen:
    """One pass over each text; of the layers' inputs only sums are kept."""
    model = context.running
    keys: list[list[torch.Tensor]] = [[] for _ in layers]
    values: list[list[torch.Tensor]] = [[] for _ in layers]
    gram, size, cross = (torch.zeros(0),) * 3
    for done, sample in enumerate(samples, 1):
        with inputs(model) as given:
            views = _training.states(model, sample)
        x = torch.stack([given[layer][0].double() for layer in layers])  # [N,T,hidden]
        for at, layer in enumerate(layers):
            keys[at].append(views[layer].k_pre.float().transpose(0, 1).flatten(1))
            values[at].append(views[layer].v.float().transpose(0, 1).flatten(1))
        both = torch.stack([torch.cat([keys[at][-1], values[at][-1]], 1).double() for at in range(len(layers))])
        sums = (x.transpose(1, 2) @ x, x.abs().sum(1), x.transpose(1, 2) @ both)
        gram, size, cross = sums if done == 1 else (gram + sums[0], size + sums[1], cross + sums[2])
        context.progress(0, 1, f"text {done} of {len(samples)}")
    tokens = sum(len(sample.tokens) for sample in samples)
    damp = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(gram.shape[1]).to(gram)
    weights = torch.linalg.solve(gram + damp, cross).chunk(2, -1)  # of keys and values, [N,hidden,C]
    weighed = [(size / tokens + 1e-6)[..., None] * weight for weight in weights]
    asvd = tuple(weight.transpose(1, 2) @ heavy for weight, heavy in zip(weights, weighed, strict=True))
    x_keys, x_values = (torch.stack([torch.cat(each) for each in side]) for side in (keys, values))
    return Seen((x_keys, x_values), (asvd[0], asvd[1]))


def begun(seen: Seen, ranks: tuple[int, int], *, asvd: bool, mixed: bool) -> tuple[Tensors, torch.Tensor]:
    """A and B to begin with, fp32 [N,C,ρ] and [N,ρ,C], and the least loss [N,2] that any of these ranks can have.

    asvd: from the weighed projections, or from x itself. mixed: the latent's energy is spread over its channels."""
    start, bound = {}, []
    for side, x, weighed, rank in zip(SIDES, seen.x, seen.asvd, ranks, strict=True):
        energy, basis = _ranks.principal(x.double().transpose(1, 2) @ x.double())
        bound.append(_ranks.left(energy)[:, rank])
        basis = (_ranks.principal(weighed)[1] if asvd else basis)[..., :rank]
        basis = basis @ _ranks.mix(rank).to(basis) if mixed else basis
        start[f"{side}.down"], start[f"{side}.up"] = (
            half.float().clone(memory_format=torch.contiguous_format) for half in (basis, basis.transpose(1, 2))
        )  # strides are not in a checkpoint, and sums depend on them
    return start, torch.stack(bound, 1).float().cpu()


def trained(
    context: Context, seen: Seen, start: Tensors, codecs: Codecs, *, steps: int, lr: float
) -> tuple[Tensors, torch.Tensor, Tensors]:
    """Of each layer and side the better of both ends, as tensors like `start`; the mean loss of a layer per step; and
    the losses at both ends, fp32 [N,2]. A branch as wide as x, without codes, is left as it is."""
    before, (_, tokens, width) = losses(seen, start, codecs), seen.x[0].shape
    if all(start[f"{side}.up"].shape[1] == width and codecs[side] is None for side in SIDES):
        return start, torch.zeros(0), {"start": before, "end": before}
    trainer = Trainer(context, start, steps, lr=dict.fromkeys(start, lr), clip=CLIP)
    energy = {side: _energy(x) for side, x in zip(SIDES, seen.x, strict=True)}
    for step in range(len(trainer.losses), steps):
        draw = torch.Generator().manual_seed(context.seed + step)
        windows = torch.randperm(tokens // WINDOW, generator=draw)[: BATCH // WINDOW]
        rows = (windows[:, None] * WINDOW + torch.arange(WINDOW)).flatten().to(seen.x[0].device)
        each = [
            relative(x[:, rows], trainer.tensors, side, codecs[side], energy[side])
            for side, x in zip(SIDES, seen.x, strict=True)
        ]
        loss = torch.stack(each)
        loss.sum().backward()
        trainer.step(float(loss.detach().mean()))
    tensors, history = trainer.done()
    after = losses(seen, {name: tensor.to(seen.x[0].device) for name, tensor in tensors.items()}, codecs)
    better = {side: (after < before)[:, at, None, None] for at, side in enumerate(SIDES)}
    kept = {name: torch.where(better[name.split(".")[0]], tensors[name], start[name].cpu()) for name in tensors}
    return kept, history, {"start": before, "end": torch.minimum(before, after)}


def _energy(x: torch.Tensor) -> torch.Tensor:
    """[N,T,C] → the mean square of a number, [N,1,1]."""
    return x.square().mean((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def relative(x: torch.Tensor, tensors: Tensors, side: str, codec: Codec | None, energy: torch.Tensor) -> torch.Tensor:
    """x [N,T,C], T in whole windows → ‖x − x̂‖²/‖x‖² [N], where ‖x‖² is by energy [N,1,1]."""
    z = x @ tensors[f"{side}.down"]
    if codec is not None:
        written = codec.decode(codec.encode(z.detach()[:, None]), z.shape[-1])[:, 0]
        z = z + (written - z).detach()
    return ((x - z @ tensors[f"{side}.up"]).square() / energy).mean((1, 2))


def losses(seen: Seen, tensors: Tensors, codecs: Codecs) -> torch.Tensor:
    """Of keys and values, over all training tokens in whole windows, fp32 [N,2]."""
    whole = seen.x[0].shape[1] // WINDOW * WINDOW
    with torch.no_grad():
        each = [
            relative(x[:, :whole], tensors, side, codecs[side], _energy(x))
            for side, x in zip(SIDES, seen.x, strict=True)
        ]
    return torch.stack(each, 1).cpu()
