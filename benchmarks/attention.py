"""Causal attention that trains in bfloat16 on a processor: as matrix products, and by torch's fused kernel in float32.

python -m benchmarks.attention
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measuring import at_least, spread, use_all_cores, write_result
from pplr.backbones.arithmetic import multiplies_bfloat16
from pplr.backbones.causal_attention import causal_attention

HEADS, SHARED, WIDTH = 9, 3, 64
"""Of SmolLM2-135M."""
SHAPES = ((16, 180), (4, 480))
"""Rows and tokens: short histories, and long ones."""
FUSED, PRODUCTS = "the fused kernel in float32", "products"


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by torch's kernel, in float32."""
    wide = (own.float() for own in (query, key, value))
    return scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).to(query.dtype)


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend as pplr does."""
    return causal_attention(query, key, value, WIDTH**-0.5)


def seconds(attend: Callable[..., Tensor], rows: int, tokens: int) -> float:
    """Time one forward and backward pass."""
    drawn = (torch.randn(rows, tokens, heads, WIDTH).bfloat16() for heads in (HEADS, SHARED, SHARED))
    states = [own.transpose(1, 2).detach().requires_grad_(True) for own in drawn]
    grad = torch.randn(rows, HEADS, tokens, WIDTH).bfloat16()
    started = time.perf_counter()
    attend(*states).backward(grad)
    return time.perf_counter() - started


def main() -> None:
    """Measure by turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    use_all_cores()
    measured, rows, notes = {}, [], []
    for batch, tokens in SHAPES:
        taken: dict[str, list[float]] = {FUSED: [], PRODUCTS: []}
        for turn in range(arguments.turns + 1):
            for name, attend in ((FUSED, fused), (PRODUCTS, products)):
                told = seconds(attend, batch, tokens)
                if turn:  # the first warms up
                    taken[name].append(told)
        medians = {name: statistics.median(own) for name, own in taken.items()}
        what = f"{batch} x {tokens} tokens"
        measured[what] = {name: spread(own) for name, own in taken.items()}
        notes.append(f"{what}: " + ", ".join(f"{name} {1e3 * own:.1f} ms" for name, own in medians.items()))
        name = f"attention in training, forward and backward, {what}, as products"
        rows.append(at_least(name, FUSED, medians[FUSED] / medians[PRODUCTS], 1.0))
    if not multiplies_bfloat16():
        notes.append("this processor has no arithmetic of bfloat16, so pplr uses the fused kernel here")
        rows = []
    print("\n".join(notes))
    write_result("attention", {"seconds": measured, "rows": rows, "notes": notes})


if __name__ == "__main__":
    main()
