"""A frozen bfloat16 layer forward and backward, by the processor's own products and widened to float32.

python -m benchmarks.bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import at_least, spread, use_all_cores, write_result
from pplr.backbones.arithmetic import WideLinear, multiplies_bfloat16

_SHAPE = (640, 576, 1536)
"""Tokens, width in, width out: a batch of four prompts through a layer of SmolLM2-135M."""


def seconds(layer: nn.Linear, states: torch.Tensor, grad: torch.Tensor) -> float:
    """Time one forward and backward pass."""
    states.grad = None
    started = time.perf_counter()
    layer(states).backward(grad)
    return time.perf_counter() - started


def main() -> None:
    """Measure by turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    use_all_cores()
    tokens, width_in, width_out = _SHAPE
    ways: dict[str, nn.Linear] = {"own products": nn.Linear(width_in, width_out, bias=False)}
    ways["widened"] = WideLinear(width_in, width_out, bias=False)
    for layer in ways.values():
        layer.to(torch.bfloat16).requires_grad_(False)
    states = torch.randn(tokens, width_in).to(torch.bfloat16).requires_grad_()
    grad = torch.randn(tokens, width_out).to(torch.bfloat16)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.turns + 1):
        for name, layer in ways.items():
            told = seconds(layer, states, grad)
            if turn:
                taken[name].append(told)
    chosen, other = ("own products", "widened") if multiplies_bfloat16() else ("widened", "own products")
    ratio = statistics.median(taken[other]) / statistics.median(taken[chosen])
    shape = f"{tokens} tokens, {width_in} to {width_out}"
    notes = [f"{name}: median {1e3 * statistics.median(own):.1f} ms" for name, own in taken.items()]
    notes.append(f"pplr uses {chosen} on this processor")
    print("\n".join([*notes, f"{other} take {ratio:.1f} times as long"]))
    content: dict[str, Any] = {"seconds": {name: spread(own) for name, own in taken.items()}, "notes": notes}
    row = at_least(f"seconds of a frozen bfloat16 layer ({shape}), the other way", f"{chosen}, pplr's way", ratio, 1.0)
    write_result("bfloat16", content | {"rows": [row]})


if __name__ == "__main__":
    main()
