"""Several clients in one pass of a stage: the frozen products see all their tokens at once, LoRA each client's own.

Every client's rows stand one after another in one row of tokens, with the padding that they came with and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pplr.backbones.attention import Part
from pplr.backbones.slots import AdapterSlots, Tenant
from pplr.stages.stage import Member, Stage, StageCall

__all__ = ["Entry", "JointPass", "fits"]


def fits(stage: Stage) -> bool:
    """Tell whether a stage can take several clients in a pass: it has LoRA, and its blocks keep batches apart."""
    return isinstance(stage.slots, AdapterSlots) and stage.blocks.keeps_apart


class Entry:
    """What one client brings to a pass.

    Args:
        member: Its adapter in the stage.
        hidden_states: (B, T, D), padded on the right, or in one row.
        call: How the stage is to be run; with the adapter, and without a mask or positions of its own.

    Attributes:
        entering: ``hidden_states`` as the leaf of a graph, if their gradient is wanted.
    """

    def __init__(self, member: Member, hidden_states: Tensor, call: StageCall) -> None:
        self.member, self.call = member, call
        self.entering = hidden_states.detach().requires_grad_(call.gradient_wanted)
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [parameter._version for parameter in self.member.parameters.values()]

    @property
    def is_current(self) -> bool:
        """Whether the adapter is still the one that the pass began with."""
        return self._versions == self._now()

    @property
    def tokens(self) -> int:
        """B · T."""
        return self.entering.shape[0] * self.entering.shape[1]

    @property
    def trained(self) -> list[Tensor]:
        """What of the adapter is trained."""
        return [parameter for parameter in self.member.parameters.values() if parameter.requires_grad]


class JointPass:
    """One forward pass of several clients, and their backward passes: all at once, or some before others.

    One graph holds the activations of all, so it serves one backward pass. Whoever comes later has the forward pass
    computed again, from what was sent and with the same dropout.

    Args:
        stage: One that :func:`fits`.
        entries: What each client brings.

    Attributes:
        leaving: What each client's rows became, (B, T, D) without a graph, in the same order.
    """

    def __init__(self, stage: Stage, entries: Sequence[Entry]) -> None:
        self._stage, self._entries = stage, list(entries)
        self._waiting = set(range(len(entries)))
        self._graph: list[Tensor] | None = _run(stage, entries)
        self.leaving = [states.detach() for states in self._graph]

    @property
    def waiting(self) -> int:
        """Clients whose gradients have not come."""
        return len(self._waiting)

    def entry(self, number: int) -> Entry:
        """Return what a client brought."""
        return self._entries[number]

    def forget(self, number: int) -> None:
        """Let go of one client's part; the activations go with the last."""
        self._waiting.discard(number)
        if not self._waiting:
            self._graph = None

    def backward(self, gradients: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
        """Send some clients' gradients back, each once; the gradients of their adapters add up.

        Args:
            gradients: (B, T, D) by the client's number.

        Returns:
            Gradients of what entered, (B, T, D) by the client's number; ``None`` where it is not wanted.

        Raises:
            RuntimeError: A gradient does not fit; no adapter's gradient has changed.
        """
        own = {number: self._entries[number] for number in gradients}
        leaving = self._ends(list(gradients))
        asking = {number: entry.entering for number, entry in own.items() if entry.entering.requires_grad}
        trained = [parameter for entry in own.values() for parameter in entry.trained]
        found = torch.autograd.grad(leaving, [*asking.values(), *trained], list(gradients.values()))
        for parameter, gradient in zip(trained, found[len(asking) :], strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for number in gradients:
            self.forget(number)
        return dict.fromkeys(gradients) | dict(zip(asking, found[: len(asking)], strict=True))

    def _ends(self, numbers: Sequence[int]) -> list[Tensor]:
        """Find the ends of a graph of some clients: that of all, if going back through it costs less than a new one."""
        graph, self._graph = self._graph, None
        own = [self._entries[number] for number in numbers]
        few = 2 * sum(entry.tokens for entry in own) < sum(entry.tokens for entry in self._entries)
        if graph is None or few or not all(entry.is_current for entry in self._entries):
            return _run(self._stage, own)
        return [graph[number] for number in numbers]


def _run(stage: Stage, entries: Sequence[Entry]) -> list[Tensor]:
    """Run the blocks once with each client's adapter on its own rows: (B_i, T_i, D) -> (B_i, T_i, D) each."""
    with torch.enable_grad():
        if len(entries) == 1:
            return [stage.run(entries[0].member, entries[0].entering, entries[0].call)]
        parts, tenants, positions = [], [], []
        for entry in entries:
            rows, tokens, _ = entry.entering.shape
            device, shared = entry.entering.device, entry.call.row
            mask = entry.call.mask(tokens, device) if stage.backbone.bidirectional else None
            parts.append(Part(rows, tokens, mask) if shared is None else Part.of(shared, device))
            tenants.append(Tenant(entry.member.parameters, entry.tokens, entry.call.dropout_seed))
            places = torch.arange(tokens).repeat(rows) if shared is None else shared.positions()[0]
            positions.append(places.to(device))
        row = torch.cat([entry.entering.flatten(0, 1) for entry in entries]).unsqueeze(0)  # (1, N, D)
        left = stage.run_row(row, torch.cat(positions).unsqueeze(0), parts, tenants)
        own = left[0].split([part.size for part in parts])
        return [states.view(entry.entering.shape) for states, entry in zip(own, entries, strict=True)]
