"""Which entries of a prompt are still held: rows of keys, found again by their bits.

Both sides of `parity.py` use it, so it imports nothing but torch.
"""

from __future__ import annotations

import torch


def held(keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """bool [K,S]: which rows of keys [K,S,D] are among kept [K,N,D], in any order.

    Raises ValueError when a kept row is no row of the prompt, or two rows cannot be told apart."""
    mask = torch.zeros(keys.shape[:2], dtype=torch.bool)
    for head, (every, some) in enumerate(zip(keys, kept, strict=True)):
        place = {row.tobytes(): at for at, row in enumerate(every.numpy())}
        if len(place) < len(every):
            raise ValueError("two entries have the same key")
        found = [place.get(row.tobytes(), -1) for row in some.numpy()]
        if -1 in found:
            raise ValueError("an entry that is held was not in the prompt")
        mask[head, torch.tensor(found, dtype=torch.long)] = True
    return mask
