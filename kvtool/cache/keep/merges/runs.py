"""Every run of similar keys becomes one entry, at its best entry's place; for the pick `runs`, which tells the runs.

Weights are `Select.weigh`; "gaussian" in KVMerger (arXiv 2407.08454), as `_base.py` has it.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.merges._base import Changed, Job, Merged, joined


def merge(job: Job) -> Merged | Changed:
    owner = job.memory.pop("run").gather(2, job.gone)
    return joined(job, torch.ones_like(owner, dtype=job.view.k.dtype), owner, torch.ones_like(owner, dtype=torch.bool))
