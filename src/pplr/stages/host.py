"""The server's side of the cut, without a network: one frozen middle stage, a tenancy for each client.

Whatever carries the calls (a function call here, gRPC elsewhere) ends at this class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState, check_adapter
from pplr.backbones.base import Backbone
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError
from pplr.stages.cut import CutPlan
from pplr.stages.optimizer import LocalObjective, StageOptimizer
from pplr.stages.stage import Member, Stage, StageCall

__all__ = ["StageHost"]


@dataclass
class _Tenancy:
    """What the server keeps for one client."""

    member: Member
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    caches: dict[int, Any] = field(default_factory=dict)
    opened: int = 0


class StageHost:
    """Runs the middle blocks for many clients around one frozen base.

    Args:
        backbone: Whose blocks.
        plan: Which blocks are the middle.
        adapter: LoRA's settings.
        training: The optimizer's settings.
    """

    def __init__(self, backbone: Backbone, plan: CutPlan, adapter: AdapterConfig, training: TrainingConfig) -> None:
        self.stage = Stage(backbone, plan.middle, adapter)
        self._training = training
        self._tenancies: dict[str, _Tenancy] = {}

    def admit(self, client: str, initial: Mapping[str, Tensor]) -> None:
        """Give a client its own middle adapter and optimizer.

        Raises:
            TransportError: The client was admitted before.
            AdapterError: A middle tensor is missing, does not fit, or is not finite.
        """
        if client in self._tenancies:
            raise TransportError(f"client {client!r} was admitted before", cure="Admit every client once.")
        shapes = self.stage.shapes
        own = {name: tensor for name, tensor in initial.items() if name in shapes}
        check_adapter(own, shapes, whose=f"client {client}'s middle adapter")
        self._tenancies[client] = _Tenancy(Member(self.stage, initial, self._training))

    def dismiss(self, client: str) -> None:
        """Let go of everything kept for a client; one that was never admitted is passed over."""
        self._tenancies.pop(client, None)

    def _of(self, client: str) -> _Tenancy:
        try:
            return self._tenancies[client]
        except KeyError:
            raise TransportError(f"client {client!r} was never admitted", cure="Admit the client first.") from None

    def forward(self, client: str, hidden_states: Tensor, call: StageCall, *, keep_as: int | None) -> Tensor:
        """Run the middle blocks: (B, T, D) -> (B, T, D).

        Args:
            client: Whose adapter.
            hidden_states: (B, T, D), from the client's input stage.
            call: How to run.
            keep_as: Step number under which activations are kept for :meth:`backward`; ``None`` keeps none.
        """
        tenancy = self._of(client)
        if keep_as is None:
            with torch.no_grad():
                return self.stage.run(tenancy.member, hidden_states, call)
        if keep_as in tenancy.kept:
            raise TransportError(f"step {keep_as} of client {client!r} ran forward twice", cure="Number steps once.")
        entering = hidden_states.detach().requires_grad_(True)
        with torch.enable_grad():
            leaving = self.stage.run(tenancy.member, entering, call)
        tenancy.kept[keep_as] = (entering, leaving)
        return leaving.detach()

    def backward(self, client: str, step: int, grad_hidden_states: Tensor) -> Tensor:
        """Send a gradient back through a kept forward pass: (B, T, D) -> (B, T, D).

        Adapter gradients add up in the client's tenancy; the kept activations are let go.

        Raises:
            TransportError: No forward pass of that step is kept, or it had another shape; what is kept stays.
        """
        tenancy = self._of(client)
        kept = tenancy.kept.get(step)
        if kept is None:
            raise TransportError(
                f"no forward pass of step {step} is kept for client {client!r}", cure="Run the step again."
            )
        entering, leaving = kept
        if grad_hidden_states.shape != leaving.shape:
            raise TransportError(
                f"a gradient of shape {tuple(grad_hidden_states.shape)} for step {step}, expected "
                f"{tuple(leaving.shape)}",
                cure="Send the gradient of that step.",
            )
        del tenancy.kept[step]
        torch.autograd.backward(leaving, grad_hidden_states)
        if entering.grad is None:
            raise TransportError(f"step {step} of client {client!r} has no gradient", cure="Run the step again.")
        return entering.grad

    def forget(self, client: str, step: int) -> None:
        """Let go of one kept forward pass."""
        self._of(client).kept.pop(step, None)

    def discard(self, client: str) -> None:
        """Let go of kept activations, gradients and caches of a client, as after an error."""
        tenancy = self._of(client)
        tenancy.kept.clear()
        tenancy.caches.clear()
        tenancy.member.optimizer.clear_gradients()

    def begin_round(
        self, client: str, total_steps: int, objective: LocalObjective, anchor: AdapterState | None
    ) -> None:
        """Prepare a round of local training of one client."""
        self._of(client).member.optimizer.begin_round(total_steps, objective, anchor)

    def gradient_norm_squared(self, client: str) -> float:
        """Squared gradient norm of the client's middle adapter, with its proximal term."""
        return self._of(client).member.optimizer.gradient_norm_squared()

    def optimizer_step(self, client: str, scale: float) -> None:
        """Step the client's middle optimizer once."""
        self._of(client).member.optimizer.step(scale)

    def end_round(self, client: str) -> None:
        """Let go of what only the round needed."""
        self._of(client).member.optimizer.end_round()

    def open_cache(self, client: str) -> int:
        """Open a key-value cache for a generation and return its number."""
        tenancy = self._of(client)
        tenancy.opened += 1
        tenancy.caches[tenancy.opened] = self.stage.backbone.new_cache(self.stage.blocks)
        return tenancy.opened

    def _cache(self, client: str, cache: int) -> Any:
        try:
            return self._of(client).caches[cache]
        except KeyError:
            raise TransportError(
                f"client {client!r} has no open cache {cache}", cure="Open one, and do not use it after closing."
            ) from None

    def decode(self, client: str, hidden_states: Tensor, call: StageCall, cache: int) -> Tensor:
        """Run the middle blocks and extend an open cache: (B, T, D) -> (B, T, D)."""
        with torch.no_grad():
            return self.stage.run(self._of(client).member, hidden_states, call, self._cache(client, cache))

    def reorder_cache(self, client: str, cache: int, rows: Tensor) -> None:
        """Keep the given rows of a cache, in the given order, as beam search asks."""
        self._cache(client, cache).reorder_cache(rows)

    def close_cache(self, client: str, cache: int) -> None:
        """Let go of a cache."""
        self._cache(client, cache)
        del self._of(client).caches[cache]

    def adapter(self, client: str) -> AdapterState:
        """Return a client's middle adapter, without copying it."""
        return self._of(client).member.adapter()

    def set_adapter(self, client: str, state: Mapping[str, Tensor]) -> None:
        """Copy in a client's middle adapter, or some of its tensors; those of other stages are passed over.

        Raises:
            AdapterError: It does not fit, or is not finite.
        """
        member = self._of(client).member
        member.check(state, whose=f"client {client}'s middle adapter")
        member.set_adapter(state)

    def optimizer(self, client: str) -> StageOptimizer:
        """Return a client's middle optimizer itself, for one that is in the same process."""
        return self._of(client).member.optimizer

    def optimizer_state(self, client: str) -> dict[str, Tensor]:
        """Return the client's middle optimizer state."""
        return self._of(client).member.optimizer.state()

    def restore_optimizer(self, client: str, state: Mapping[str, Tensor]) -> None:
        """Take back a client's middle optimizer state."""
        self._of(client).member.optimizer.restore(state)
