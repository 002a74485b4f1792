"""A learned noisy code at the first cut, which is trained to hold little besides what ranking needs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pplr.config import StatePrivacyConfig
from pplr.stages.cut import CutPlan

__all__ = ["Bottleneck"]

_IN, _BIAS, _NOISE, _OUT = "cut.in.weight", "cut.in.bias", "cut.log_variance", "cut.out.weight"
_LOG_VARIANCE = 0.0
"""Where log-variances start: with as much noise as a code that tells nothing has, and means of about that size."""


class Bottleneck:
    r"""A stochastic code of each hidden state: what crosses is a linear map of it.

    z = W h / rms(h) + b + s ⊙ n with n ~ N(0, I), and E z crosses.

    The mean of KL(N(W h / rms(h) + b, s²) ‖ N(0, I)) is an upper bound on how much z tells of h, in nats: the rate. A
    weight on it in training is the variational information bottleneck. W, b, log s² and E are trained with the input
    stage.

    Args:
        width: r, numbers of a code.
        hidden_size: D.

    Cites:
        alemi2017deep

    Example:
        >>> Bottleneck(2, 8).shapes["cut.in.weight"]
        (2, 8)
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        self.width = width
        self.shapes: dict[str, tuple[int, ...]] = {
            _IN: (width, hidden_size),
            _BIAS: (width,),
            _NOISE: (width,),
            _OUT: (hidden_size, width),
        }

    @classmethod
    def of(cls, states: StatePrivacyConfig | None, plan: CutPlan, hidden_size: int) -> Bottleneck | None:
        """Make the one that a setting asks for, where the model is cut."""
        if states is None or states.code_width is None or plan.is_whole:
            return None
        return cls(states.code_width, hidden_size)

    def start(self, name: str, source: torch.Generator) -> Tensor:
        """Draw a tensor to start from."""
        shape = self.shapes[name]
        if name == _BIAS:
            return torch.zeros(shape)
        if name == _NOISE:
            return torch.full(shape, _LOG_VARIANCE)
        return torch.randn(shape, generator=source) / math.sqrt(shape[1])

    def mean(self, hidden_states: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        """Say where the code of each state lies without noise: (..., D) -> (..., r) float32."""
        states = hidden_states.float()
        return F.linear(F.rms_norm(states, states.shape[-1:], eps=1e-6), trained[_IN], trained[_BIAS])

    def deviations(self, trained: Mapping[str, Tensor]) -> Tensor:
        """Say how large the noise is in each number of a code: (r,)."""
        return (trained[_NOISE] / 2).exp()

    def rate(self, mean: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        """Bound what each code tells of its state, in nats: (..., r) -> (...)."""
        log_variance = trained[_NOISE]
        return (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1) / 2

    def expand(self, code: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        """Make of codes what crosses: (..., r) -> (..., D)."""
        return F.linear(code, trained[_OUT])
