"""Scaled dot-product attention as transformers computes it, with the number format that a CPU trains fastest in.

The CPU's fused kernel runs its bfloat16 backward pass at half the speed of its float32 one. So while gradients are
wanted, bfloat16 attention is computed otherwise: as matrix products where the processor is fast at them, the attention
is causal and the sequence short, and in float32 elsewhere. Everything else is transformers' own.

Batches of different shapes can stand one after another in one row of tokens, so that the linear layers see them as one
matrix. Within :func:`batches` attention keeps them apart: each attends to itself alone, as it would by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pplr.backbones.arithmetic import is_widened
from pplr.backbones.causal_attention import MOST_TOKENS, causal_attention

__all__ = ["ATTENTION", "Part", "batches"]

ATTENTION = "pplr_sdpa"
"""Name under which transformers knows it."""


@dataclass(frozen=True)
class Part:
    """One batch among several that stand one after another in a row of tokens.

    Args:
        rows: B.
        tokens: T, of each row.
        mask: (B, T), 0 where a token is padding; absent where blocks look back only and padding is on the right.
    """

    rows: int
    tokens: int
    mask: Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens of all rows, with padding."""
        return self.rows * self.tokens


_PARTS: ContextVar[Sequence[Part]] = ContextVar("parts", default=())


@contextmanager
def batches(parts: Sequence[Part]) -> Iterator[None]:
    """Let the one row of tokens that blocks run within be these batches, one after another."""
    token = _PARTS.set(parts)
    try:
        yield
    finally:
        _PARTS.reset(token)


def _mask(batch_size: int, q_length: int, kv_length: int, **options: Any) -> Any:
    """Make a mask as transformers does; of several batches, one for each."""
    if not (parts := _PARTS.get()):
        return sdpa_mask(batch_size, q_length, kv_length, **options)
    own = [None if part.mask is None else part.mask.bool() for part in parts]
    return [
        sdpa_mask(part.rows, part.tokens, part.tokens, **(options | {"attention_mask": mask}))
        for part, mask in zip(parts, own, strict=True)
    ]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend: (B, heads, T, D_head) -> (B, T, heads, D_head)."""
    if not (parts := _PARTS.get()):
        return _alone(module, query, key, value, attention_mask, **options), None
    masks = attention_mask or [None] * len(parts)
    found = []
    apart = (_apart(states, parts) for states in (query, key, value))
    for mask, q, k, v in zip(masks, *apart, strict=True):
        states = _alone(module, q, k, v, mask, **options)
        found.append(states.flatten(0, 1))  # (B_i, T_i, heads, D_head) -> (B_i T_i, heads, D_head)
    return torch.cat(found).unsqueeze(0), None


def _alone(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Tensor:
    """Attend within one batch: (B, heads, T, D_head) -> (B, T, heads, D_head)."""
    dtype = query.dtype
    slow = query.requires_grad and dtype == torch.bfloat16 and query.device.type == "cpu"
    if slow and not is_widened(query) and _is_plain(module, query, key, attention_mask, options):
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        return causal_attention(query, key, value, scaling).transpose(1, 2)
    if slow or is_widened(query):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype == dtype:
            attention_mask = attention_mask.float()
    states, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return states.to(dtype)


def _apart(states: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Part a row of tokens into its batches: (1, heads, N, D_head) -> (B_i, heads, T_i, D_head) each."""
    own = states[0].split([part.size for part in parts], dim=1)
    return [
        found.unflatten(1, (part.rows, part.tokens)).transpose(0, 1) for found, part in zip(own, parts, strict=True)
    ]


def _is_plain(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Tell whether every position attends to all that lies behind it, of a short sequence without a past."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    whole = attention_mask is None and query.shape[2] == key.shape[2] <= MOST_TOKENS
    return (
        bool(causal)
        and whole
        and not any(options.get(name) for name in ("dropout", "softcap", "cache"))
        and (options.get("position_bias") is None)
    )


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
