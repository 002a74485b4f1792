"""What a client sends is checked before it meets another client's adapter; who does not pass is left out, by name."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState, check_adapter
from pplr.errors import AdapterError, FederationError
from pplr.federation.decisions import Trained

__all__ = ["check_trained", "too_large", "update_norm"]

_FEWEST = 3
"""Updates among which one can be told to be too large."""


def check_trained(trained: Trained, initial: AdapterState, *, whose: str) -> None:
    """Refuse a report that cannot be of an honest training: names, shapes, dtypes, finite numbers.

    Args:
        trained: What the client tells.
        initial: What all clients exchange, as they started.
        whose: Its name, for messages.

    Raises:
        AdapterError: Its adapter does not fit, or is not finite.
        FederationError: What it tells beside it cannot be.
    """
    for name, tensor in trained.adapter.items():
        if name in initial and tensor.dtype != initial[name].dtype:
            raise AdapterError(
                f"{whose}: {name} is {tensor.dtype}, expected {initial[name].dtype}",
                cure="Send tensors in the dtype in which they were handed out.",
            )
    check_adapter(trained.adapter, {name: tuple(own.shape) for name, own in initial.items()}, whose=whose)
    result = trained.result
    told = (trained.samples, result.samples, result.steps, result.tokens, result.targets)
    numbers = [number for number in (result.loss, result.seconds) if number is not None]
    counts = [count for count in told if count is not None]
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or min(counts) < 1:
        raise FederationError(
            f"{whose} tells of a loss of {result.loss}, {result.seconds} s and the counts {counts}, which no training "
            "gives",
            cure="Look at that client's log.",
        )


@torch.no_grad()
def update_norm(adapter: Mapping[str, Tensor], before: AdapterState) -> float:
    """Measure how far training moved an adapter: ‖θ − θ_before‖₂ over all tensors, in float64."""
    squared = sum(float((own.double() - before[name].double()).square().sum()) for name, own in adapter.items())
    return math.sqrt(squared)


def too_large(norms: Mapping[str, float], factor: float) -> dict[str, str]:
    """Find updates that are far larger than is usual in this round: over ``factor`` times the median norm.

    Honest updates differ, as clients take more or fewer steps, but not by orders of magnitude; and with few clients
    one huge update would take over every mix. The median holds while more than half of the updates are honest. Among
    fewer than three none can be told to be too large.

    Args:
        norms: Of the update of every client whose report passed :func:`check_trained`.
        factor: How many times the median.

    Returns:
        The reason for each client whose update is too large.
    """
    if len(norms) < _FEWEST:
        return {}
    bound = factor * statistics.median(norms.values())
    if bound == 0:
        return {}  # most have not moved, and nothing is a multiple of that
    return {
        name: f"its update has norm {norm:.3g}, more than {factor:g} times the round's median of {bound / factor:.3g}"
        for name, norm in norms.items()
        if norm > bound
    }
