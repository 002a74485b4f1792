"""Scaled dot-product attention as transformers computes it, with the number format that a CPU trains fastest in.

The CPU's fused kernel runs its bfloat16 backward pass at half the speed of its float32 one. So while gradients are
wanted, bfloat16 attention is computed in float32, which is also the more exact; everything else is transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pplr.backbones.arithmetic import is_widened

__all__ = ["ATTENTION"]

ATTENTION = "pplr_sdpa"
"""Name under which transformers knows it."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend: (B, heads, T, D_head) -> (B, T, heads, D_head)."""
    dtype = query.dtype
    slow = query.requires_grad and dtype == torch.bfloat16 and query.device.type == "cpu"
    if slow or is_widened(query):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype == dtype:
            attention_mask = attention_mask.float()
    states, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return states.to(dtype), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
