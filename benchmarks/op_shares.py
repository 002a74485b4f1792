"""Where the time and the bytes of a piece of work go, by kind of operation, as torch's profiler sees them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["KINDS", "kind_of", "shares_of"]

KINDS = {
    kind: names.split()
    for kind, names in {
        "products": "mm addmm bmm baddbmm addmv mv dot linear mkldnn_linear",
        "attention": "scaled_dot_product flash_attention",
        "copies and number formats": "copy to_copy clone contiguous cat stack index_put fill",
        "dropout": "random ge bernoulli dropout",
        "norms and activations": "mul add sub div pow sum mean rsqrt sqrt neg exp cos sin silu gelu tanh layer_norm",
        "softmax and ranking": "softmax log_softmax nll_loss topk sort masked_fill gather argmax",
        "look-ups": "embedding index isin searchsorted where",
    }.items()
}
"""Each kind with how its operations' names begin, without ``aten::`` and underscores at the ends."""
ELSE = "other operations"
BETWEEN = "between operations"
"""Python, and whatever no operation of torch does."""


def kind_of(name: str) -> str:
    """Say which kind an operation is of.

    Example:
        >>> kind_of("aten::mm"), kind_of("aten::silu_backward"), kind_of("aten::view")
        ('products', 'norms and activations', 'other operations')
    """
    bare = name.removeprefix("aten::").strip("_").removeprefix("native_")
    for kind, names in KINDS.items():
        if any(bare == known or bare.startswith((f"{known}_", f"{known}.")) for known in names):
            return kind
    return ELSE


def shares_of(work: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Profile a piece of work, and share its time out by kind of operation.

    Args:
        work: Is run once.

    Returns:
        For each kind that took part, largest first: its share of the ``seconds`` between beginning and end, and the
        ``bytes`` of memory that its operations asked for. What the profiler itself costs counts as time between
        operations.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        started = time.perf_counter()
        work()
        whole = time.perf_counter() - started
    seconds: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for event in told.key_averages():
        kind = kind_of(event.key)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
        sizes[kind] = sizes.get(kind, 0.0) + max(0, event.self_cpu_memory_usage)
    within = sum(seconds.values())
    whole = max(whole, within)
    shares = {kind: {"seconds": own / whole, "bytes": sizes[kind]} for kind, own in seconds.items()}
    shares[BETWEEN] = {"seconds": (whole - within) / whole, "bytes": 0.0}
    return dict(sorted(shares.items(), key=lambda item: -item[1]["seconds"]))
