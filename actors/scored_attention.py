"""Attention that no kernel at hand computes: scores that are capped before the softmax (Gemma 2), and sinks, which take
a share of the softmax and give nothing (gpt-oss).

The scores exist, but for a block of queries at a time, which the gradient computes again: memory grows with the length
of a document, not with its square. A block looks at no key after its last query, so half of the products are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_SCORES = 2**24  # scores of one block (64 MiB in float32)


def scored_attention(
    query: Tensor,  # [count, heads, length, head_dim]
    key: Tensor,  # [count, key_heads, length, head_dim]
    value: Tensor,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,  # [heads]: a logit beside the scores of every query
    window: int | None,
    dropout: float = 0.0,
    block_scores: int = BLOCK_SCORES,
) -> Tensor:
    """Causal attention within each document, each query over the `window` keys up to it. Softmax in float32."""
    count, heads, length, head_dim = query.shape
    key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
    scale = head_dim**-0.5 if scaling is None else scaling
    rows = max(1, block_scores // (count * heads * length))

    def block(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, first_query: int, first_key: int) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        queries = torch.arange(first_query, first_query + q.shape[2], device=q.device)[:, None]
        distance = queries - torch.arange(first_key, first_key + k.shape[2], device=q.device)
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(unseen, -torch.inf)
        if sinks is not None:
            beside = sinks.float().view(1, heads, 1, 1).expand(count, heads, q.shape[2], 1)
            scores = torch.cat([scores, beside], dim=-1)
        weights = F.dropout(scores.softmax(-1)[..., : k.shape[2]], dropout)
        return weights.to(v.dtype) @ v

    outputs = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        first = 0 if window is None else max(0, start - window + 1)
        part = query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], sinks, start, first
        outputs.append(checkpoint(block, *part, use_reentrant=False) if torch.is_grad_enabled() else block(*part))
    return torch.cat(outputs, dim=2)
