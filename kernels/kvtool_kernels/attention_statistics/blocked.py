"""`attention_statistics` in plain PyTorch for any device, a block of rows and one KV head at a time.

With w = exp(logit − row maximum) and l = Σ w, every sum is a matrix product with 1/l, so weights are never
normalised. The distance sum uses that the entries of equal distance lie on a diagonal: read with a row stride one
longer, diagonals are columns (a margin of zeros on the left absorbs the rows' ends).
"""

from __future__ import annotations

import torch

from kvtool_kernels.attention_statistics.reference import Summary

ROWS = 64  # rows of a block, at most
WEIGHTS = 2**18  # weights of a block and query head, about: two such buffers should stay in cache
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
    """As the reference, in O(T · rows) memory."""
    heads, tokens, width = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    dtype = q.dtype
    q, k, v = (q * scale).float(), k.float(), v.float()
    rows = min(ROWS, max(16, WEIGHTS // tokens), tokens)
    new = q.new_zeros
    summary = Summary(
        new(heads, tokens, width),
        new(heads, tokens),
        new(heads, cells, tokens),
        new(heads, tokens),
        new(heads, tokens),
        new(heads),
    )
    place = torch.arange(tokens, device=q.device)
    cell = (torch.arange(tokens) * cells // tokens).tolist()
    logits, weights = (new(group * rows * (rows + tokens)) for _ in range(2))
    for low in range(0, tokens, rows):
        high = min(low + rows, tokens)
        left = 0 if window is None else max(0, low - window + 1)
        own = place[low:high]
        members = own * cells // tokens - cell[low]
        share = torch.nn.functional.one_hot(members).T.float()  # [cells here, rows here]
        hidden = place[left:high] > own[:, None]
        if window is not None:
            hidden |= place[left:high] <= own[:, None] - window
        late = (own >= first).float()
        count, span = high - low, high - left
        for head in range(kv_heads):
            mine = slice(head * group, (head + 1) * group)
            # w lies in a buffer with `count` zero columns on its left
            w = weights[: group * count * (count + span)].view(group, count, count + span)
            w[:, :, :count] = 0.0
            body = w[:, :, count:]
            t = logits[: group * count * span].view(group, count, span)
            torch.matmul(
                q[mine, low:high].reshape(group * count, width), k[head, left:high].T, out=t.view(group * count, span)
            )
            if softcap is not None:
                t.div_(softcap).tanh_().mul_(softcap)
            if window is None:
                t[:, :, low - left :].masked_fill_(hidden[:, low - left :], HIDDEN)
            else:
                t.masked_fill_(hidden, HIDDEN)
            top = t.amax(-1, keepdim=True)
            t.sub_(top)
            torch.exp(t, out=body)
            total = seen = body.sum(-1)
            if sink_logits is not None:
                total = seen + torch.exp(sink_logits[mine, None].float() - top[..., 0])
            inverse = total.reciprocal()
            if low == 0:
                summary.corner[mine] = body[:, 0, 0] * inverse[:, 0]
            summary.out[mine, low:high] = (body @ v[head, left:high]) * inverse[..., None]
            summary.lse[mine, low:high] = top[..., 0] + total.log()
            summary.entropy[mine, low:high] = (total.log() * seen - torch.linalg.vecdot(body, t)) * inverse
            summary.columns[mine, cell[low] : cell[high - 1] + 1, left:high] += (share * inverse[:, None]) @ body
            skew = torch.as_strided(
                w,
                (group, count, count + (low - left) + 1),
                (count * (count + span), count + span + 1, 1),
                w.storage_offset(),
            )
            diagonals = ((late * inverse)[:, None] @ skew)[:, 0]  # distance count + low − left … 0
            reach = min(diagonals.shape[1], high)
            summary.distance[mine, :reach] += diagonals.flip(-1)[:, :reach]
    return summary._replace(out=summary.out.to(dtype))
