"""Products of bfloat16 matrices, where the processor has no instructions for them.

Processors without AVX-512 or its like multiply bfloat16 matrices many times slower than float32 ones
(``python -m benchmarks.bfloat16`` says how many). There the factors are widened for the product and the result is
rounded back: the same numbers up to the order of additions, since bfloat16 products are summed in float32 everywhere.
What is stored stays bfloat16, and so does what passes from block to block, so machines of both kinds work in one
federation.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WideLinear", "is_widened", "multiplies_bfloat16", "widen"]

_TOO_SLOW = 3.0
_X86 = ("x86_64", "amd64", "i386", "i686")
_ROWS = 2048
"""Rows of a weight that are widened at once, so that a large head costs no wide copy of itself."""
_STATES = 512
"""States that are widened at once, so that a large batch costs no wide copy of itself either."""


@cache
def multiplies_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 matrices at about the speed of float32 ones.

    x86 processors say so themselves, so that all processes of a machine answer alike. Others are timed.
    """
    if platform.machine().lower() in _X86:
        return "AVX512" in torch.backends.cpu.get_cpu_capability()
    wide = torch.ones(256, 1024)
    narrow = wide.to(torch.bfloat16)
    return _fastest(lambda: narrow @ narrow.t()) < _TOO_SLOW * _fastest(lambda: wide @ wide.t())


def _fastest(run: Callable[[], Any]) -> float:
    run()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def is_widened(tensor: Tensor) -> bool:
    """Tell whether products of this tensor are computed in float32."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not multiplies_bfloat16()


class _WideProduct(torch.autograd.Function):
    """x Wᵀ + b with W frozen: neither x nor a wide copy of W is kept for the backward pass.

    W is kept beside autograd's saved tensors: a block that runs again for its backward pass ends once it has saved
    what it saved at first, so a last layer that saves nothing is not computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        out = x.new_empty(*x.shape[:-1], len(weight))
        narrow, flat = x.flatten(0, -2), out.view(-1, len(weight))  # (N, D_in), (N, D_out)
        for rows in _parts(len(weight), _ROWS):
            wide, added = weight[rows].float(), None if bias is None else bias[rows].float()
            for some in _parts(len(narrow), _STATES):
                flat[some, rows] = F.linear(narrow[some].float(), wide, added)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, narrow = ctx.weight, grads[0].flatten(0, -2)
        first, *others = _parts(len(weight), _ROWS)
        sums = grads[0].dtype if not others else torch.float32  # of a small layer no sum is kept wide
        out = torch.empty(len(narrow), weight.shape[1], dtype=sums)
        for rows in (first, *others):
            wide = weight[rows].float()
            for some in _parts(len(narrow), _STATES):
                product = narrow[some, rows].float() @ wide
                out[some] = product if rows is first else product.add_(out[some])
        return out.to(grads[0].dtype).view(*grads[0].shape[:-1], -1), None, None


def _parts(count: int, most: int) -> list[slice]:
    return [slice(start, start + most) for start in range(0, count, most)]


class WideLinear(nn.Linear):
    """A frozen linear layer that computes in float32 what it stores in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """Apply the layer: (..., D_in) -> (..., D_out)."""
        return _WideProduct.apply(input, self.weight, self.bias)


def widen(module: nn.Module) -> None:
    """Let every frozen linear layer of a module compute in float32, if its products would be too slow otherwise."""
    for layer in module.modules():
        if type(layer) is nn.Linear and is_widened(layer.weight):
            layer.__class__ = WideLinear  # the same tensors, another product
