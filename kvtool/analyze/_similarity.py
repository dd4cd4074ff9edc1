"""Layer × layer similarities: of the subspaces that channels use, and of the relations between tokens."""

from __future__ import annotations

import torch

SHARE = 8  # a subspace has C / SHARE dimensions


def rank_of(gram: torch.Tensor) -> int:
    """Dimensions r of the subspaces that `overlap` compares."""
    return max(1, gram.shape[-1] // SHARE)


def overlap(gram: torch.Tensor) -> torch.Tensor:
    """Second moments [L,C,C] → S [L,L].

    With U_i [C,r] the top r eigenvectors, S_ij = (|U_iᵀ U_j|²_F / r − r/C) / (1 − r/C): 1 = the same
    subspace, 0 = what random ones share on average.
    """
    rank, width = rank_of(gram), gram.shape[-1]
    chance = rank / width
    basis = torch.linalg.eigh(gram.double()).eigenvectors[..., -rank:]  # [L,C,r]
    everything = basis.transpose(0, 1).flatten(1)  # [C,L·r]
    shared = [(one.T @ everything).square().unflatten(1, (-1, rank)).sum((0, 2)) for one in basis]
    means = torch.stack(shared) / rank
    return (means - chance) / max(1 - chance, 1e-9)


def cka(blocks: torch.Tensor) -> torch.Tensor:
    """Raw blocks [N,L,K,64,D] → debiased linear CKA [L,L] over their tokens.

    With k = X Xᵀ, its diagonal zeroed and U-centred (Székely and Rizzo, Annals of Statistics 42(6), 2014),
    the entry is ⟨k_i, k_j⟩ / (|k_i| |k_j|): about 0 for unrelated layers, however few the tokens.
    """
    kernels = []
    for layer in range(blocks.shape[1]):
        x = blocks[:, layer].transpose(1, 2).flatten(0, 1).flatten(1).double()  # [T,C]
        kernel = (x @ x.T).fill_diagonal_(0.0)
        rows, n = kernel.sum(1), len(x)
        kernel = kernel - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        kernel.fill_diagonal_(0.0)
        kernels.append((kernel / kernel.norm().clamp_min(1e-30)).flatten())
    stacked = torch.stack(kernels)
    return stacked @ stacked.T
