"""Causal attention as matrix products, for processors that multiply bfloat16 fast and attend in it slowly.

The CPU's fused kernel attends at a small part of the speed of a product, and keeps float32 copies of what it is given.
Here queries are taken some at a time, each with the keys up to the last of them, so that little of what lies ahead is
computed. Scores and softmax are in float32; probabilities are kept in the number format of the queries, and so are the
products with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MOST_TOKENS", "causal_attention"]

MOST_TOKENS = 512
"""Longest sequence: with longer ones the probabilities, T for each query, outgrow the fused kernel's copies."""
_QUERIES = 64
"""Queries that are taken at once, about."""


def _spans(tokens: int) -> list[tuple[int, int]]:
    parts = max(1, round(tokens / _QUERIES))
    return [(tokens * part // parts, tokens * (part + 1) // parts) for part in range(parts)]


class _Causal(torch.autograd.Function):
    """softmax(scaling Q Kᵀ) V over what lies behind; G query heads share a key head, and are rows of one product.

    With more keys than queries, the queries are those of the last keys.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, heads, tokens, width = query.shape
        shared, past = key.shape[1], key.shape[2] - tokens
        q = query.reshape(batch, shared, heads // shared, tokens, width)
        k, v = (own.reshape(batch * shared, past + tokens, width) for own in (key, value))
        wide = torch.promote_types(query.dtype, torch.float32)
        keys, out, kept = k.to(wide), torch.empty_like(q, memory_format=torch.contiguous_format), []
        for start, end in _spans(tokens):
            seen = past + end
            scores = torch.bmm(_rows(q, start, end).to(wide) * scaling, keys[:, :seen].transpose(1, 2))
            by_head = scores.view(-1, end - start, seen)  # (B heads, queries, keys)
            by_head[..., past + start :] += torch.full((end - start, end - start), -torch.inf, dtype=wide).triu_(1)
            share = torch.softmax(scores, dim=-1).to(query.dtype)
            out[:, :, :, start:end] = torch.bmm(share, v[:, :seen]).view(*q.shape[:3], end - start, width)
            kept.append(share)
        ctx.scaling = scaling
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(batch, heads, tokens, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        batch, shared, group, tokens, width = q.shape
        grad_out, past = grads[0].reshape(q.shape), k.shape[1] - tokens
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros(k.shape, dtype=wide), torch.zeros(v.shape, dtype=wide)
        for (start, end), share in zip(_spans(tokens), kept, strict=True):
            own, seen = _rows(grad_out, start, end), past + end
            grad_v[:, :seen] += torch.bmm(share.transpose(1, 2), own)
            of_share = torch.bmm(own, v[:, :seen].transpose(1, 2))
            scores = torch._softmax_backward_data(of_share, share, -1, share.dtype) * ctx.scaling
            grad_q[:, :, :, start:end] = torch.bmm(scores, k[:, :seen]).view(*q.shape[:3], end - start, width)
            grad_k[:, :seen] += torch.bmm(scores.transpose(1, 2), _rows(q, start, end))
        of_keys, of_values = (g.to(k.dtype).view(batch, shared, -1, width) for g in (grad_k, grad_v))
        return grad_q.view(batch, shared * group, tokens, width), of_keys, of_values, None


def _rows(states: Tensor, start: int, end: int) -> Tensor:
    """Take some queries of every head: (B, shared, G, T, d) -> (B shared, G queries, d)."""
    batch, shared, group, _, width = states.shape
    return states[:, :, :, start:end].reshape(batch * shared, group * (end - start), width)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    r"""Let every position attend to itself and to what lies behind it.

    softmax(scaling Q Kᵀ + M) V, with M_ij = −∞ for j > i

    Args:
        query: (B, heads, T, d).
        key: (B, heads that are shared, T_past + T, d), heads as many or a divisor of the query's; the queries are of
            the last T.
        value: The same shape.
        scaling: What scores are multiplied with.

    Returns:
        (B, heads, T, d), in the query's number format.
    """
    return _Causal.apply(query, key, value, scaling)
