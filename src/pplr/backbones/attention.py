"""Scaled dot-product attention as transformers computes it, with the number format that a CPU trains fastest in.

The CPU's fused kernel runs its bfloat16 backward pass at half the speed of its float32 one. So while gradients are
wanted, bfloat16 attention is computed otherwise: as matrix products where the processor is fast at them, the attention
is causal and the sequence short, and in float32 elsewhere. Everything else is transformers' own.

Batches of different shapes can stand one after another in one row of tokens, so that the linear layers see them as one
matrix. Within :func:`batches` attention keeps them apart: each attends to itself alone, as it would by itself. So do
the sequences of a :class:`~pplr.backbones.shared_row.SharedRow`.

On a GPU, cuDNN's kernel is left out: PyTorch tries it first on recent ones, and it prepares a plan for every shape that
it has not met, while the lengths of batches here are ever new ones. Other kernels are allowed or not as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pplr.backbones.arithmetic import is_widened
from pplr.backbones.causal_attention import MOST_TOKENS, causal_attention
from pplr.backbones.shared_row import Places, SharedRow, joined, spread

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
        places: Where its tokens are found, when they stand as those of a
            :class:`~pplr.backbones.shared_row.SharedRow`, without padding.
        rests: Where those are found that are not shared, after the shared ones.
    """

    rows: int
    tokens: int
    mask: Tensor | None = None
    places: Places | None = None
    rests: Places | None = None

    @classmethod
    def of(cls, row: SharedRow, device: torch.device | str) -> Part:
        """Make a batch of the sequences of a row, for blocks that look back only."""
        rests = Places(SharedRow(0, row.lengths), device)
        return cls(len(row.lengths), row.longest, None, Places(row, device), rests)

    @property
    def size(self) -> int:
        """Tokens in the row, with the padding that stands there."""
        return self.rows * self.tokens if self.places is None else len(self.places.to_row)


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
    apart = (states.split([part.size for part in parts], dim=2) for states in (query, key, value))
    for part, mask, q, k, v in zip(parts, masks, *apart, strict=True):
        if part.places is None:
            states = _alone(module, _rows(q, part), _rows(k, part), _rows(v, part), mask, **options)
            found.append(states.flatten(0, 1)[None])  # (B, T, heads, D_head) -> (1, B T, heads, D_head)
        else:
            found.append(_shared(module, q, k, v, part.places, part.rests, mask, **options))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1), None


def _shared(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Places,
    rests: Places | None,
    mask: Tensor | None,
    **options: Any,
) -> Tensor:
    """Attend within the sequences of a row: (1, heads, N, D_head) -> (1, N, heads, D_head)."""
    k, v, shared = spread(key, places), spread(value, places), places.shared
    if rests is None or not _is_faster_as_products(module, query, k, mask, options):
        return joined(_alone(module, spread(query, places), k, v, mask, **options), places)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    own = causal_attention(spread(query[:, :, shared:], rests), k, v, scaling)  # shared tokens are keys alone
    found = joined(own.transpose(1, 2), rests)
    if shared == 0:
        return found
    before = causal_attention(query[:, :, :shared], key[:, :, :shared], value[:, :, :shared], scaling)
    return torch.cat([before.transpose(1, 2), found], dim=1)


def _alone(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Tensor:
    """Attend within one batch: (B, heads, T, D_head) -> (B, T, heads, D_head)."""
    dtype = query.dtype
    if query.shape[2] == key.shape[2] and _is_faster_as_products(module, query, key, attention_mask, options):
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        return causal_attention(query, key, value, scaling).transpose(1, 2)
    if _is_slow(query) or is_widened(query):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype == dtype:
            attention_mask = attention_mask.float()
    if _reads_shared_heads(query, key, attention_mask, options):
        return _grouped(query, key, value, attention_mask, options.get("scaling")).to(dtype)
    with _without_plans(query.device):
        states, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return states.to(dtype)


@contextmanager
def _without_plans(device: torch.device) -> Iterator[None]:
    """Leave out the kernel that prepares a plan for each shape; the backward pass takes the kernel of the forward."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _reads_shared_heads(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Tell whether transformers would copy keys and values for every query head that shares them, needlessly."""
    return (
        mask is not None
        and mask.dim() == 4
        and mask.shape[1] == 1
        and query.device.type == "cpu"
        and not query.requires_grad
        and not key.requires_grad
        and query.shape[1] > key.shape[1]
        and not any(options.get(name) for name in ("dropout", "softcap", "cache"))
        and options.get("position_bias") is None
    )


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None) -> Tensor:
    """Attend with the queries of all heads that share a key head as rows of one: (B, heads, T, d) -> (B, T, heads, d).

    The scores of each query are the same sums as with copies of keys and values.
    """
    batch, heads, tokens, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(batch, shared, heads // shared * tokens, width)
    masks = mask.repeat(1, 1, heads // shared, 1)
    states = F.scaled_dot_product_attention(rows, key, value, attn_mask=masks, scale=scaling)
    return states.reshape(batch, heads, tokens, width).transpose(1, 2)


def _rows(states: Tensor, part: Part) -> Tensor:
    """Part a batch's tokens into its rows: (1, heads, B T, D_head) -> (B, heads, T, D_head)."""
    return states[0].unflatten(1, (part.rows, part.tokens)).transpose(0, 1)


def _is_slow(query: Tensor) -> bool:
    """Tell whether the fused kernel's backward pass would be slow."""
    return query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu"


def _is_faster_as_products(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Tell whether every position attends to all that lies behind it, of short sequences that train in bfloat16."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return (
        _is_slow(query)
        and not is_widened(query)
        and bool(causal)
        and attention_mask is None
        and key.shape[2] <= MOST_TOKENS
        and not any(options.get(name) for name in ("dropout", "softcap", "cache"))
        and (options.get("position_bias") is None)
    )


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
