"""AdamW over one stage's LoRA tensors, in steps that several stages take together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pplr.backbones.adapters import AdapterState, is_end
from pplr.config import TrainingConfig
from pplr.errors import CheckpointError, FederationError

__all__ = ["LocalObjective", "StageOptimizer", "learning_rate"]


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Rate of one optimizer step: a linear warm-up, then linear decay to zero, or constant.

    Args:
        step: Steps taken before, from 0.
        total_steps: Steps of the whole schedule.
        config: Peak rate, warm-up and schedule. The warm-up takes at most half of all steps.

    Example:
        >>> config = TrainingConfig(learning_rate=1.0, warmup_steps=2)
        >>> [learning_rate(step, 6, config) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = min(config.warmup_steps, total_steps // 2)
    if step < warmup:
        return config.learning_rate * step / warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * max(0, total_steps - step) / max(1, total_steps - warmup)


@dataclass(frozen=True)
class LocalObjective:
    """What a round of local training minimises besides the loss.

    Args:
        proximal_mu: μ of the term μ/2 ‖θ − θ_anchor‖².
        train_a: Whether LoRA's A is trained; with A frozen, averaging B averages the products exactly.
    """

    proximal_mu: float = 0.0
    train_a: bool = True


class StageOptimizer:
    """AdamW over the LoRA tensors of one client's stage.

    A step has two halves, so that stages hosted apart act as one model: first each stage reports its squared
    gradient norm, then all scale by the same factor and step.

    Args:
        parameters: The stage's tensors, by name.
        config: AdamW's settings and the schedule.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.steps = 0
        self.total_steps = 1
        self._objective = LocalObjective()
        self._anchor: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._adam = self._new_adam()

    def _new_adam(self) -> torch.optim.AdamW | None:
        if not self.parameters:
            return None
        groups: list[dict[str, Any]] = []
        for factor, of_ends in ((1.0, False), (self.config.ends_rate, True)):
            own = [parameter for name, parameter in self.parameters.items() if is_end(name) == of_ends]
            groups += [{"params": own, "factor": factor}] if own else []
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, weight_decay=self.config.weight_decay)

    def begin_round(self, total_steps: int, objective: LocalObjective, anchor: AdapterState | None) -> None:
        """Prepare a round of local training.

        Args:
            total_steps: Steps of the whole schedule.
            objective: What is minimised besides the loss.
            anchor: θ_anchor of the proximal term; needed when its μ is above 0.

        Raises:
            FederationError: There is a proximal term and no anchor.
        """
        if objective.proximal_mu > 0 and anchor is None:
            raise FederationError("a proximal term without an anchor", cure="Give the adapter that it pulls towards.")
        if self.config.optimizer_state == "reset":
            self.steps = 0
            self._adam = self._new_adam()
        self.total_steps = total_steps
        self._objective = objective
        self._anchor = {}
        if objective.proximal_mu > 0 and anchor is not None:
            self._anchor = {
                name: anchor[name].detach().to(parameter.device, copy=True)
                for name, parameter in self.parameters.items()
            }
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(objective.train_a or "lora_A" not in name)
        self.clear_gradients()

    def gradient_norm_squared(self) -> float:
        """Add the proximal term to the gradients and return their squared norm over this stage, in float64.

        To be called once before each step, since the term is added each time.
        """
        for name, parameter in self.parameters.items():
            if name in self._anchor and parameter.requires_grad:
                pull = self._objective.proximal_mu * (parameter.detach() - self._anchor[name])
                parameter.grad = pull if parameter.grad is None else parameter.grad + pull
        return self.data_norm_squared()

    def data_norm_squared(self) -> float:
        """Return the squared norm over this stage, in float64, of what backward passes alone have left."""
        gradients = [own.grad for own in self.parameters.values() if own.grad is not None]
        squares = [gradient.double().square().sum() for gradient in gradients]
        total = 0.0
        for square in torch.stack(squares).tolist() if squares else ():  # an accelerator is waited for once
            total += square
        return total

    def keep_gradient(self, scale: float) -> None:
        """Add the gradients times a factor to a sum that is kept apart, in float64, and clear them.

        Args:
            scale: The factor; with 0 nothing is added, whatever the gradients are.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and scale != 0.0:
                own = parameter.grad.double() * scale
                self._kept[name] = own if name not in self._kept else self._kept[name] + own
            parameter.grad = None

    def release_gradient(self, noise: Callable[[torch.Size], Tensor], divisor: float) -> None:
        """Make the kept sum, with noise in every tensor that is trained, the gradients of the next step.

        Args:
            noise: Draws float64 noise of a shape.
            divisor: What sum and noise are divided by.
        """
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                total = noise(parameter.shape).to(parameter.device)
                total = total + self._kept[name] if name in self._kept else total
                parameter.grad = (total / divisor).to(parameter.dtype)
        self._kept = {}

    def step(self, scale: float) -> None:
        """Scale the gradients, step once, and clear them.

        Args:
            scale: The clipping factor, the same for all stages.
        """
        if self._adam is not None:
            rate = learning_rate(self.steps, self.total_steps, self.config)
            for group in self._adam.param_groups:
                group["lr"] = rate * group["factor"]
            if scale != 1.0:
                for parameter in self.parameters.values():
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
            self._adam.step()
        self.steps += 1
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Let go of what backward passes left and of what is kept of them, as after a step or an error."""
        self._kept = {}
        for parameter in self.parameters.values():
            parameter.grad = None

    def end_round(self) -> None:
        """Let go of the round's anchor."""
        self._anchor = {}
        self._objective = LocalObjective()

    def state(self) -> dict[str, Tensor]:
        """Return AdamW's moments and the number of steps, as flat tensors, without copying them."""
        flat = {"steps": torch.tensor(self.steps)}
        if self._adam is not None:
            for name, parameter in self.parameters.items():
                moments = self._adam.state.get(parameter)
                if moments:
                    flat[f"exp_avg.{name}"] = moments["exp_avg"]
                    flat[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
                    flat[f"step.{name}"] = moments["step"].reshape(1)
        return flat

    def restore(self, flat: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned.

        Raises:
            CheckpointError: A moment has another shape than its parameter.
        """
        self.steps = int(flat["steps"])
        self._adam = self._new_adam()
        for name, parameter in self.parameters.items():
            if self._adam is None or f"exp_avg.{name}" not in flat:
                continue
            if flat[f"exp_avg.{name}"].shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint's optimizer state of {name} has shape {tuple(flat[f'exp_avg.{name}'].shape)}, "
                    f"expected {tuple(parameter.shape)}",
                    cure="Resume with the configuration that wrote it.",
                )
            self._adam.state[parameter] = {
                "step": flat[f"step.{name}"].reshape(()).clone(),
                "exp_avg": flat[f"exp_avg.{name}"].clone().to(parameter.device),
                "exp_avg_sq": flat[f"exp_avg_sq.{name}"].clone().to(parameter.device),
            }
