"""Norms of frozen blocks: transformers' own numbers, with a backward pass that keeps and moves less.

Autograd takes a norm apart: it keeps wide copies of what enters, and passes over them a dozen times. Here what enters
is kept as it is, and the backward pass takes some rows at a time, so that what is wide stays in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

__all__ = ["FrozenRMSNorm", "freeze_norms"]

_ROWS = 128
"""States whose gradients are computed at once, on a CPU."""


class _Norm(torch.autograd.Function):
    """w x / √(mean(x²) + ε), each operation and its order as autograd has them, so that no bit differs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat = [own.reshape(-1, own.shape[-1]) for own in (grads[0], x, inverse)]
        into, rows = out.view(-1, width), _ROWS if x.device.type == "cpu" else max(1, x.numel())
        for start in range(0, len(into), rows):
            some, entered, scale = (own[start : start + rows] for own in flat)
            gradient = (some * weight).float()
            wide = entered.to(torch.float32, copy=True)
            of_scale = (gradient * wide).sum(-1, keepdim=True)
            of_square = (-0.5 * of_scale) * scale.pow(3) / width
            gradient.mul_(scale).add_(wide.mul_(2 * of_square))
            into[start : start + rows] = gradient
        return out, None, None


class FrozenRMSNorm(LlamaRMSNorm):
    """A root-mean-square norm whose weight gets no gradient."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Scale states to length: (..., D) -> (..., D)."""
        if torch.is_grad_enabled() and hidden_states.requires_grad and not self.weight.requires_grad:
            return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


def freeze_norms(module: nn.Module) -> None:
    """Let every root-mean-square norm of a module's frozen blocks be a :class:`FrozenRMSNorm`, of the same tensors."""
    for norm in module.modules():
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            norm.__class__ = FrozenRMSNorm
