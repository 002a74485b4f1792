"""What a client can ask of the side that hosts its middle stage, and the form of it that stays in the process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.stages.host import StageHost
from pplr.stages.optimizer import LocalObjective, StageOptimizer
from pplr.stages.stage import StageCall

__all__ = ["KeepingTransport", "LocalTransport", "TakingTransport", "Traffic", "Transport"]


@dataclass
class Traffic:
    """Bytes of tensors that crossed the cut; padding does not count.

    Args:
        bytes_up: From the client to the server.
        bytes_down: From the server to the client.
    """

    bytes_up: int = 0
    bytes_down: int = 0

    def since(self, before: Traffic) -> Traffic:
        """Return what crossed since an earlier reading."""
        return Traffic(self.bytes_up - before.bytes_up, self.bytes_down - before.bytes_down)

    def reading(self) -> Traffic:
        """Return a copy that stands still."""
        return Traffic(self.bytes_up, self.bytes_down)


class Transport(Protocol):
    """One client's way to its middle stage. Shapes are those of :class:`~pplr.stages.host.StageHost`."""

    traffic: Traffic

    def forward(self, hidden_states: Tensor, lengths: Tensor, call: StageCall, *, keep_as: int | None) -> Tensor:
        """Run the middle stage; ``lengths`` (B,) says how many of the T states of each row are real."""

    def backward(self, step: int, grad_hidden_states: Tensor, lengths: Tensor) -> Tensor | None:
        """Send a gradient back through a kept forward pass; nothing comes back where that pass wanted nothing."""

    def discard(self) -> None:
        """Let go of kept activations and caches, as after an error."""

    def begin_round(self, total_steps: int, objective: LocalObjective, anchor: AdapterState | None) -> None:
        """Prepare a round of local training."""

    def gradient_norm_squared(self) -> float:
        """Squared gradient norm of the middle adapter."""

    def optimizer_step(self, scale: float) -> None:
        """Step the middle optimizer once."""

    def end_round(self) -> None:
        """Let go of what only the round needed."""

    def open_cache(self) -> int:
        """Open a key-value cache in the middle stage."""

    def decode(self, hidden_states: Tensor, call: StageCall, cache: int) -> Tensor:
        """Run the middle stage and extend a cache."""

    def reorder_cache(self, cache: int, rows: Tensor) -> None:
        """Keep the given rows of a cache."""

    def append_rows(self, cache: int, other: int, rows: Tensor, skip: int) -> None:
        """Append rows of another open cache; see :func:`~pplr.backbones.caches.append_rows`."""

    def close_cache(self, cache: int) -> None:
        """Let go of a cache."""

    def adapter(self) -> AdapterState:
        """Read the middle adapter."""

    def set_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Write the middle adapter."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Read the middle optimizer's state."""

    def restore_optimizer(self, state: Mapping[str, Tensor]) -> None:
        """Write the middle optimizer's state."""

    def leave(self) -> None:
        """Let go of everything that the other side holds in memory for this client; nothing can be asked after it."""


@runtime_checkable
class TakingTransport(Transport, Protocol):
    """A transport to a server on which somebody else mixes the middle adapters."""

    def take_adapter(self, label: str) -> None:
        """Have the middle adapter become the one that is offered under a label."""


@runtime_checkable
class KeepingTransport(Transport, Protocol):
    """A transport behind which a cache can be kept from one generation to the next, as it tells when it is old."""

    def holds_cache(self, cache: int) -> bool:
        """Tell whether a cache is open."""

    def adapter_version(self) -> int:
        """Return a number that grows whenever the middle adapter is written."""


class LocalTransport:
    """Crosses the cut by a function call: nothing is serialised, but what would cross is counted.

    Args:
        host: The server's side.
        client: The client that it carries calls for.
    """

    def __init__(self, host: StageHost, client: str) -> None:
        self.traffic = Traffic()
        self._host = host
        self._client = client

    @property
    def optimizer(self) -> StageOptimizer:
        """The optimizer of the middle adapter, whose gradients are at hand in this process."""
        return self._host.optimizer(self._client)

    def _count(self, states: Tensor, tokens: int, *, replies: bool = True) -> None:
        crossed = tokens * states.shape[-1] * states.element_size()
        self.traffic.bytes_up += crossed
        if replies:
            self.traffic.bytes_down += crossed

    def forward(self, hidden_states: Tensor, lengths: Tensor, call: StageCall, *, keep_as: int | None) -> Tensor:
        """Run the middle stage: (B, T, D) -> (B, T, D)."""
        self._count(hidden_states, int(lengths.sum()))
        return self._host.forward(self._client, hidden_states, call, keep_as=keep_as)

    def backward(self, step: int, grad_hidden_states: Tensor, lengths: Tensor) -> Tensor | None:
        """Send a gradient back: (B, T, D) -> (B, T, D), if what entered wants one."""
        entering = self._host.backward(self._client, step, grad_hidden_states)
        self._count(grad_hidden_states, int(lengths.sum()), replies=entering is not None)
        return entering

    def discard(self) -> None:
        """Let go of kept activations and caches."""
        self._host.discard(self._client)

    def begin_round(self, total_steps: int, objective: LocalObjective, anchor: AdapterState | None) -> None:
        """Prepare a round of local training."""
        self._host.begin_round(self._client, total_steps, objective, anchor)

    def gradient_norm_squared(self) -> float:
        """Squared gradient norm of the middle adapter."""
        return self._host.gradient_norm_squared(self._client)

    def optimizer_step(self, scale: float) -> None:
        """Step the middle optimizer once."""
        self._host.optimizer_step(self._client, scale)

    def end_round(self) -> None:
        """Let go of what only the round needed."""
        self._host.end_round(self._client)

    def open_cache(self) -> int:
        """Open a key-value cache in the middle stage."""
        return self._host.open_cache(self._client)

    def decode(self, hidden_states: Tensor, call: StageCall, cache: int) -> Tensor:
        """Run the middle stage and extend a cache: (B, T, D) -> (B, T, D)."""
        self._count(hidden_states, int(call.new_lengths(hidden_states.shape[1]).sum()))
        return self._host.decode(self._client, hidden_states, call, cache)

    def reorder_cache(self, cache: int, rows: Tensor) -> None:
        """Keep the given rows of a cache."""
        self._host.reorder_cache(self._client, cache, rows)

    def append_rows(self, cache: int, other: int, rows: Tensor, skip: int) -> None:
        """Append rows of another open cache."""
        self._host.append_rows(self._client, cache, other, rows, skip)

    def holds_cache(self, cache: int) -> bool:
        """Tell whether a cache is open."""
        return self._host.holds_cache(self._client, cache)

    def adapter_version(self) -> int:
        """Return a number that grows whenever the middle adapter is written."""
        return self._host.adapter_version(self._client)

    def close_cache(self, cache: int) -> None:
        """Let go of a cache."""
        self._host.close_cache(self._client, cache)

    def adapter(self) -> AdapterState:
        """Read the middle adapter, without copying it."""
        return self._host.adapter(self._client)

    def set_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Write the middle adapter."""
        self._host.set_adapter(self._client, state)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Read the middle optimizer's state."""
        return self._host.optimizer_state(self._client)

    def restore_optimizer(self, state: Mapping[str, Tensor]) -> None:
        """Write the middle optimizer's state."""
        self._host.restore_optimizer(self._client, state)

    def leave(self) -> None:
        """Let go of everything that the host holds for this client."""
        self._host.dismiss(self._client)
