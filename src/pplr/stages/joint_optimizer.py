"""One optimizer over a client's own stages and the middle one, wherever that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.errors import CheckpointError, ConfigError
from pplr.stages.optimizer import LocalObjective, StageOptimizer
from pplr.stages.transport import LocalTransport, Transport

__all__ = ["JointOptimizer"]


class JointOptimizer:
    """Steps all stages of a client's model together: gradients are clipped by one norm over all of them.

    Args:
        own: The optimizers of the client's own stages.
        transport: The way to the middle stage's; ``None`` when the model is not cut.
    """

    def __init__(self, own: Sequence[StageOptimizer], transport: Transport | None) -> None:
        self._own = tuple(own)
        self._transport = transport

    def begin_round(self, total_steps: int, objective: LocalObjective, anchor: AdapterState | None) -> None:
        """Prepare a round of local training; see :meth:`~pplr.stages.optimizer.StageOptimizer.begin_round`."""
        for optimizer in self._own:
            optimizer.begin_round(total_steps, objective, anchor)
        if self._transport is not None:
            self._transport.begin_round(total_steps, objective, anchor)

    def step(self, clip_norm: float | None) -> float:
        """Clip by the global norm over all stages and step each of them once.

        Args:
            clip_norm: The most that the norm may be; ``None`` clips nothing.

        Returns:
            The gradient norm before clipping.
        """
        squared = sum(optimizer.gradient_norm_squared() for optimizer in self._own)
        if self._transport is not None:
            squared += self._transport.gradient_norm_squared()
        norm = float(squared**0.5)
        scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        for optimizer in self._own:
            optimizer.step(scale)
        if self._transport is not None:
            self._transport.optimizer_step(scale)
        return norm

    def keep_gradient(self, clip_norm: float, *, middle: bool = True) -> float:
        """Clip what backward passes left by its norm over all stages, add it to the sum that is kept, and clear it.

        A gradient that is not finite adds nothing: it could not be bounded, and an error would tell of it.

        Args:
            clip_norm: The most that it adds.
            middle: Whether the middle adapter is trained; without it, what reached it is let go.

        Returns:
            The norm before clipping.

        Raises:
            ConfigError: The middle adapter is to be trained, and its gradients are on a server.
        """
        optimizers = self._clipped_together(middle=middle)
        norm = math.sqrt(sum(optimizer.data_norm_squared() for optimizer in optimizers))
        scale = min(1.0, clip_norm / norm) if norm > 0 else 1.0
        for optimizer in optimizers:
            optimizer.keep_gradient(scale if math.isfinite(norm) else 0.0)
        if self._transport is not None and not middle:
            self._transport.discard()
        return norm

    def release_gradient(self, noise: Callable[[torch.Size], Tensor], divisor: float, *, middle: bool = True) -> None:
        """Make the kept sum with noise the gradient of the next step.

        See :meth:`~pplr.stages.optimizer.StageOptimizer.release_gradient`.
        """
        for optimizer in self._clipped_together(middle=middle):
            optimizer.release_gradient(noise, divisor)

    def _clipped_together(self, *, middle: bool) -> tuple[StageOptimizer, ...]:
        """Collect the optimizers of all stages whose gradients are clipped together."""
        if self._transport is None or not middle:
            return self._own
        if not isinstance(self._transport, LocalTransport):
            raise ConfigError(
                "a user's gradient is clipped over all stages at once, and the middle one is on a stage server",
                cure="Set privacy.dp.freeze_middle: true, or train without a stage server.",
            )
        return (*self._own, self._transport.optimizer)

    def end_round(self) -> None:
        """Let go of what only the round needed."""
        for optimizer in self._own:
            optimizer.end_round()
        if self._transport is not None:
            self._transport.end_round()

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer's state of all stages as flat tensors, without copying those of this process."""
        flat: dict[str, Tensor] = {}
        for optimizer in self._own:
            flat |= optimizer.state()
        if self._transport is not None:
            flat |= self._transport.optimizer_state()
        return flat

    def restore(self, flat: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned.

        Raises:
            CheckpointError: It has no step count.
        """
        if "steps" not in flat:
            raise CheckpointError("the optimizer state has no step count", cure="Resume from an older checkpoint.")
        for optimizer in self._own:
            optimizer.restore(flat)
        if self._transport is not None:
            self._transport.restore_optimizer(flat)
