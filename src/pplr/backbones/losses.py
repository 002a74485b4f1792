"""Losses that keep less than their plain form would, and what a target is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pplr.config import EncoderConfig, ItemVectorsConfig
from pplr.seeds import derive_seed
from pplr.storage import sha256_bytes

__all__ = ["catalog_loss", "draw_negatives", "head_loss"]

_ROWS = 64
"""States whose logits are in memory at once."""


def draw_negatives(input_ids: Tensor, labels: Tensor, count: int | None, total: int) -> Tensor | None:
    """Draw the items that a batch's targets are told apart from; the draw follows from the batch.

    Args:
        input_ids: What the batch is made of.
        labels: (M,) targets, item numbers.
        count: Items to draw.
        total: N, items of the catalog.

    Returns:
        Sorted item numbers, each once, the targets among them; ``None`` where all items are to be compared.
    """
    if count is None or count >= total:
        return None
    seed = derive_seed(0, "negatives", sha256_bytes(input_ids.cpu().numpy().tobytes()))
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.unique(torch.cat([labels, drawn.to(labels.device)]))


def catalog_loss(
    queries: Tensor,
    items: Callable[[Tensor | None], Tensor],
    labels: Tensor,
    input_ids: Tensor,
    config: ItemVectorsConfig | EncoderConfig,
    total: int,
    left_out: Tensor,
) -> Tensor:
    """Sum the cross-entropy of each target's cosine, divided by τ, among the catalog.

    While gradients are wanted, it may be among the negatives drawn for this batch, and some items may be left out.

    Args:
        queries: (M, width), each of length 1.
        items: Gives (N, width) of the whole catalog, or of chosen item numbers, each of length 1.
        labels: (M,) item numbers.
        input_ids: What the batch is made of; negatives follow from it.
        config: Temperature and number of negatives.
        total: N, items of the catalog.
        left_out: (N,), true where no target is compared with an item while training; empty for none.

    Returns:
        A scalar in float32.
    """
    training = torch.is_grad_enabled()
    chosen = draw_negatives(input_ids, labels, config.negatives, total) if training else None
    if chosen is not None:
        labels = torch.searchsorted(chosen, labels)
    scores = (queries / config.temperature) @ items(chosen).t()
    if training and len(left_out):
        scores = scores.masked_fill(left_out if chosen is None else left_out[chosen], -torch.inf)
    return F.cross_entropy(scores, labels, reduction="sum")


class _HeadLoss(torch.autograd.Function):
    """The loss a few rows at a time; of each only the gradient of its state is kept."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
        total = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states)
        for start in range(0, len(states), _ROWS):
            rows = slice(start, start + _ROWS)
            with torch.enable_grad():
                part = states[rows].detach().requires_grad_(True)
                loss = F.cross_entropy(head(part).float(), labels[rows], reduction="sum")
            (gradient[rows],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def head_loss(head: Callable[[Tensor], Tensor], states: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy of a frozen head's logits, without holding those of more than 64 states.

    The logits of a large vocabulary outweigh everything else that a short answer keeps. Since the head is frozen,
    the gradient of a state follows at once from its own logits, which are then let go (as in Liger's fused linear
    cross-entropy, arXiv 2410.10989).

    Args:
        head: Maps (M, D) to (M, V), row by row; its own tensors get no gradient.
        states: (M, D).
        labels: (M,), each below V.

    Returns:
        A scalar in float32.
    """
    if len(states) <= _ROWS:
        return F.cross_entropy(head(states).float(), labels, reduction="sum")
    if torch.is_grad_enabled() and states.requires_grad:
        return _HeadLoss.apply(states, head, labels)
    parts = [
        F.cross_entropy(head(states[start : start + _ROWS]).float(), labels[start : start + _ROWS], reduction="sum")
        for start in range(0, len(states), _ROWS)
    ]
    return torch.stack(parts).sum()
