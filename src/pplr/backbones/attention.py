"""Scaled dot-product attention as transformers computes it, with the number format that a CPU trains fastest in.

The CPU's fused kernel runs its bfloat16 backward pass at half the speed of its float32 one. So while gradients are
wanted, bfloat16 attention is computed otherwise: as matrix products where the processor is fast at them, the attention
is causal and the sequence short, and in float32 elsewhere. Everything else is transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pplr.backbones.arithmetic import is_widened
from pplr.backbones.causal_attention import MOST_TOKENS, causal_attention

__all__ = ["ATTENTION"]

ATTENTION = "pplr_sdpa"
"""Name under which transformers knows it."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend: (B, heads, T, D_head) -> (B, T, heads, D_head)."""
    dtype = query.dtype
    slow = query.requires_grad and dtype == torch.bfloat16 and query.device.type == "cpu"
    if slow and not is_widened(query) and _is_plain(module, query, key, attention_mask, options):
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        return causal_attention(query, key, value, scaling).transpose(1, 2), None
    if slow or is_widened(query):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype == dtype:
            attention_mask = attention_mask.float()
    states, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return states.to(dtype), None


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
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
