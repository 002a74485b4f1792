"""The server's side of the cut, without a network: one frozen middle stage, a tenancy for each client.

Whatever carries the calls (a function call here, gRPC elsewhere) ends at this class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState, check_adapter
from pplr.backbones.base import Backbone
from pplr.backbones.caches import append_rows
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError
from pplr.stages.cut import CutPlan
from pplr.stages.optimizer import LocalObjective, StageOptimizer
from pplr.stages.stage import Member, Stage, StageCall
from pplr.stages.together import Entry, JointPass, fits

__all__ = ["Asked", "StageHost"]


@dataclass(frozen=True)
class Asked:
    """A training pass that a client asks for.

    Args:
        client: Whose adapter.
        step: Its number.
        hidden_states: (B, T, D), or the gradient of what left.
        call: How to run; not needed for a gradient.
    """

    client: str
    step: int
    hidden_states: Tensor
    call: StageCall = field(default_factory=StageCall)


@dataclass
class _Tenancy:
    """What the server keeps for one client.

    Args:
        member: Its adapter and optimizer.
        kept: By step, what entered a pass of its own and what left.
        joint: By step, a pass together with others, and its number there.
        caches: By number.
        opened: How many.
    """

    member: Member
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    joint: dict[int, tuple[JointPass, int]] = field(default_factory=dict)
    caches: dict[int, Any] = field(default_factory=dict)
    opened: int = 0

    def let_go(self, step: int) -> None:
        """Let go of a kept pass."""
        self.kept.pop(step, None)
        if (joint := self.joint.pop(step, None)) is not None:
            joint[0].forget(joint[1])

    def let_go_all(self) -> None:
        """Let go of every kept pass."""
        for step in [*self.kept, *self.joint]:
            self.let_go(step)


class StageHost:
    """Runs the middle blocks for many clients around one frozen base.

    Args:
        backbone: Whose blocks.
        plan: Which blocks are the middle.
        adapter: LoRA's settings.
        training: The optimizer's settings.
        recompute: Whether training runs each block again in the backward pass rather than keep its activations.
    """

    def __init__(
        self,
        backbone: Backbone,
        plan: CutPlan,
        adapter: AdapterConfig,
        training: TrainingConfig,
        *,
        recompute: bool = False,
    ) -> None:
        self.stage = Stage(backbone, plan.middle, adapter, recompute=recompute)
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
        if (tenancy := self._tenancies.pop(client, None)) is not None:
            tenancy.let_go_all()

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
        self.check_step(client, keep_as)
        entering = hidden_states.detach().requires_grad_(call.gradient_wanted)
        with torch.enable_grad():
            leaving = self.stage.run(tenancy.member, entering, call)
        tenancy.kept[keep_as] = (entering, leaving)
        return leaving.detach()

    def forward_together(self, asked: Sequence[Asked]) -> list[Tensor]:
        """Run the middle blocks once for several clients, each with its own adapter: (B, T, D) -> (B, T, D) each.

        It equals :meth:`forward` for one client after another, up to the order of additions in the frozen products.
        Activations are kept for :meth:`backward`.

        Args:
            asked: One pass of each client.

        Raises:
            TransportError: One of them is a step that was taken; no pass is kept.
        """
        tenancies = [self._of(own.client) for own in asked]
        for own in asked:
            self.check_step(own.client, own.step)
        entries = [
            Entry(tenancy.member, own.hidden_states, own.call) for own, tenancy in zip(asked, tenancies, strict=True)
        ]
        joint = JointPass(self.stage, entries)
        for number, (own, tenancy) in enumerate(zip(asked, tenancies, strict=True)):
            tenancy.joint[own.step] = (joint, number)
        return joint.leaving

    def backward(self, client: str, step: int, grad_hidden_states: Tensor) -> Tensor | None:
        """Send a gradient back through a kept forward pass: (B, T, D) -> (B, T, D).

        Adapter gradients add up in the client's tenancy; the kept activations are let go.

        Returns:
            The gradient of what entered; ``None`` where the call said that it is not wanted. Then nothing is computed
            below the lowest block that is trained.

        Raises:
            TransportError: No forward pass of that step is kept, or it had another shape; what is kept stays.
        """
        self.check_gradient(client, step, grad_hidden_states)
        tenancy = self._of(client)
        if step in tenancy.joint:
            return self.backward_together([Asked(client, step, grad_hidden_states)])[0]
        entering, leaving = tenancy.kept.pop(step)
        torch.autograd.backward(leaving, grad_hidden_states)
        if entering.requires_grad and entering.grad is None:
            raise TransportError(f"step {step} of client {client!r} has no gradient", cure="Run the step again.")
        return entering.grad

    def backward_together(self, asked: Sequence[Asked]) -> list[Tensor | None]:
        """Send gradients back through one pass of several clients, of all or some: (B, T, D) -> (B, T, D) each.

        Args:
            asked: One gradient of each client.

        Returns:
            Of each what :meth:`backward` does.

        Raises:
            TransportError: They are not of one pass, or a gradient does not fit; what is kept stays.
        """
        for own in asked:
            self.check_gradient(own.client, own.step, own.hidden_states)
        found = [self._of(own.client).joint.get(own.step) for own in asked]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found) or len({id(joint) for joint, _ in parts}) != 1:
            raise TransportError("gradients of several passes", cure="Send those of one pass.")
        entering = parts[0][0].backward(
            {number: own.hidden_states for (_, number), own in zip(parts, asked, strict=True)}
        )
        for own in asked:
            del self._of(own.client).joint[own.step]
        return [entering[number] for _, number in parts]

    def check_step(self, client: str, step: int) -> None:
        """Refuse a step number under which a pass is kept.

        Raises:
            TransportError: There is one.
        """
        tenancy = self._of(client)
        if step in tenancy.kept or step in tenancy.joint:
            raise TransportError(f"step {step} of client {client!r} ran forward twice", cure="Number steps once.")

    def check_gradient(self, client: str, step: int, grad_hidden_states: Tensor) -> None:
        """Refuse a gradient that fits no kept pass.

        Raises:
            TransportError: No forward pass of that step is kept, it had another shape, or it was one of several clients
                and this client's adapter has changed since.
        """
        tenancy = self._of(client)
        if step in tenancy.joint:
            joint, number = tenancy.joint[step]
            shape = joint.leaving[number].shape
            if not joint.entry(number).is_current:
                raise TransportError(
                    f"the adapter of client {client!r} changed between step {step} and its gradient",
                    cure="Run the step again.",
                )
        elif step in tenancy.kept:
            shape = tenancy.kept[step][1].shape
        else:
            raise TransportError(
                f"no forward pass of step {step} is kept for client {client!r}", cure="Run the step again."
            )
        if grad_hidden_states.shape != shape:
            raise TransportError(
                f"a gradient of shape {tuple(grad_hidden_states.shape)} for step {step}, expected {tuple(shape)}",
                cure="Send the gradient of that step.",
            )

    @property
    def takes_several(self) -> bool:
        """Whether several clients can be in one pass."""
        return fits(self.stage)

    def awaited(self, joint: JointPass) -> frozenset[str]:
        """Name the clients whose gradients a pass of several waits for."""
        return frozenset(
            name
            for name, tenancy in list(self._tenancies.items())
            if any(own is joint for own, _ in list(tenancy.joint.values()))
        )

    def joint_pass(self, client: str, step: int) -> JointPass | None:
        """Find the pass that a client's step was part of; ``None`` for one of its own, or none."""
        found = self._of(client).joint.get(step)
        return None if found is None else found[0]

    def forget(self, client: str, step: int) -> None:
        """Let go of one kept forward pass."""
        self._of(client).let_go(step)

    def discard(self, client: str) -> None:
        """Let go of kept activations, gradients and caches of a client, as after an error."""
        tenancy = self._of(client)
        tenancy.let_go_all()
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

    def append_rows(self, client: str, cache: int, other: int, rows: Tensor, skip: int) -> None:
        """Append rows of another open cache; see :func:`~pplr.backbones.caches.append_rows`."""
        append_rows(self._cache(client, cache), self._cache(client, other), rows, skip)

    def holds_cache(self, client: str, cache: int) -> bool:
        """Tell whether a cache is open."""
        return cache in self._of(client).caches

    def adapter_version(self, client: str) -> int:
        """Return a number that grows whenever the client's middle adapter is written."""
        return self._of(client).member.version

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
