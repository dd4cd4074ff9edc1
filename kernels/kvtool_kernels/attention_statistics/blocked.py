"""`attention_statistics` in plain PyTorch for any device, a block of rows and one KV head at a time.

With s = logit − row maximum and A = softmax(s), a row's log-sum-exp is maximum − log max A and its entropy is
−log max A − A·s, neither of which cancels, however large the logits are. Column sums are a matrix product. The
distance sum uses that the entries of equal distance lie on a diagonal: read with a row stride one longer, diagonals
are columns; what a row lacks on its left it finds at the right end of the row before, where the causal mask left
zeros.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attention_statistics.reference import Summary

ROWS = 64  # rows of a block
HIDDEN = -1e30  # a finite logit whose exponential is 0


def attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cells: int = 1,
    first: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> Summary:
    """As the reference, in O(T · rows) memory; `out` lies in memory as [T,H,D], which is what a projection reads."""
    heads, tokens, width = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    rows = min(ROWS, tokens)

    def new(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=q.device)

    summary = Summary(
        q.new_empty(tokens, heads, width).transpose(0, 1),
        new(heads, tokens),
        new(heads, cells, tokens),
        new(heads, tokens),  # by distance from the largest to 0, until the end
        new(heads, tokens),
        new(heads),
    )
    place = torch.arange(tokens, device=q.device)
    cell = (torch.arange(tokens) * cells // tokens).tolist()
    buffers = new(2, group * rows * tokens)
    for head in range(kv_heads):
        mine = slice(head * group, (head + 1) * group)
        keys, values = k[head].float(), v[head].float()
        for low in range(0, tokens, rows):
            high = min(low + rows, tokens)
            left = 0 if window is None else max(0, low - window + 1)
            own, count, span = place[low:high], high - low, high - left
            logits, weights = buffers[:, : group * count * span].view(2, group, count, span)
            torch.matmul(
                (q[mine, low:high].float() * scale).reshape(-1, width), keys[left:high].T, out=logits.view(-1, span)
            )
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            logits[:, :, low - left :].masked_fill_(own > own[:, None], HIDDEN)
            if window is not None:
                logits.masked_fill_(place[left:high] <= own[:, None] - window, HIDDEN)
            top = logits.amax(-1, keepdim=True)
            torch.softmax(logits.sub_(top), -1, out=weights)
            total = weights.amax(-1).log_().neg_()
            lse, entropy = top[..., 0] + total, total - logits.mul_(weights).sum(-1)
            kept = torch.ones_like(lse)  # share of each row's mass that the sink leaves
            if sink_logits is not None:
                sink = sink_logits[mine, None].float()
                kept = torch.sigmoid(lse - sink)
                lse, entropy = torch.logaddexp(lse, sink), kept * entropy + torch.special.entr(kept)
            summary.out[mine, low:high] = (weights @ values[left:high]) * kept[..., None]
            summary.lse[mine, low:high] = lse
            summary.entropy[mine, low:high] = entropy
            here = torch.arange(cell[low], cell[high - 1] + 1, device=q.device)
            share = (own * cells // tokens == here[:, None]) * kept[:, None]  # [G, cells here, rows here]
            summary.columns[mine, cell[low] : cell[high - 1] + 1, left:high] += share @ weights
            late = (own >= first) * kept
            far = tokens - span  # where the largest distance here belongs
            summary.distance[mine, far + count - 1 :] += late[:, :1] * weights[:, 0, : span - count + 1]
            if count > 1:  # the first row has no row before it
                skew = weights.as_strided(
                    (group, count - 1, span),
                    (count * span, span + 1, 1),
                    weights.storage_offset() + span + 2 - count,
                )
                summary.distance[mine, far:] += (late[:, None, 1:] @ skew)[:, 0]
            if low == 0:
                summary.corner[mine] = weights[:, 0, 0] * kept[:, 0]
    return summary._replace(distance=summary.distance.flip(-1))
