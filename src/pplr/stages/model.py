"""The model as the clients of one process share it: one frozen base, cut, and what each client gets of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState, adapter_shapes, check_adapter, initial_adapter, natural_order
from pplr.backbones.base import Backbone, Normal
from pplr.config import AdapterConfig, StatePrivacyConfig, TrainingConfig
from pplr.seeds import derive_seed
from pplr.stages.bottleneck import Bottleneck
from pplr.stages.boundary import Guard
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.host import StageHost
from pplr.stages.stage import Stage
from pplr.stages.transport import LocalTransport, Transport

__all__ = ["CutModel"]


class CutModel:
    """One frozen base, cut by a plan, that any number of clients in this process share.

    Args:
        backbone: The base.
        plan: The cut.
        adapter: LoRA's settings.
        training: The optimizer's settings.
        server: The base that the server's side holds, when the two sides hold parts of it apart in this process.
        connect: Makes a client's transport to a server elsewhere; then this process hosts no middle stage.
        in_flight: Micro-batches of a batch under way at once, where the server is elsewhere.
        states: What is done to what crosses, of which a learned code is a part of the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        plan: CutPlan,
        adapter: AdapterConfig,
        training: TrainingConfig,
        server: Backbone | None = None,
        connect: Callable[[str, CutPlan], Transport] | None = None,
        in_flight: int = 1,
        states: StatePrivacyConfig | None = None,
    ) -> None:
        self.backbone = backbone
        self._in_flight = in_flight
        self._rate_weight = 0.0 if states is None else states.rate_weight or 0.0
        bottleneck = Bottleneck.of(states, plan, backbone.hidden_size)
        self.plan = plan
        self.training = training
        self.input = Stage(backbone, plan.input, adapter, "input", bottleneck=bottleneck, recompute=training.recompute)
        self.output = Stage(backbone, plan.output, adapter, "output", recompute=training.recompute)
        self.host: StageHost | None = None
        self._transports: dict[str, Transport] = {}
        self._connect = None if plan.is_whole else connect
        if self._connect is None and not plan.is_whole:
            self.host = StageHost(server or backbone, plan, adapter, training, recompute=training.recompute)
        self._middle_shapes = adapter_shapes(backbone, plan.middle, adapter)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trained tensor of all stages, in natural order."""
        found = self.input.shapes | self.output.shapes | self._middle_shapes
        return {name: found[name] for name in natural_order(found)}

    @property
    def hosted_elsewhere(self) -> frozenset[str]:
        """Names of the tensors that another process hosts."""
        return frozenset(self._middle_shapes) if self._connect is not None else frozenset()

    def initial_adapter(self, seed: int) -> AdapterState:
        """Draw the one adapter that every client starts from; the same for every cut."""
        ends = self.input.end_shapes | self.output.end_shapes
        start = initial_adapter(self.shapes, seed)
        for name, shape in ends.items():
            source = torch.Generator().manual_seed(derive_seed(seed, "initial adapter", name))
            if (code := self.input.bottleneck) is not None and name in code.shapes:
                start[name] = code.start(name, source)
            else:
                start[name] = self.backbone.initial_end(name, shape, source)
        return start

    def secret_start(self, normal: Normal) -> AdapterState:
        """Draw what a client starts from a secret of its own; nothing for most backbones."""
        return self.backbone.secret_start(self.input.end_shapes | self.output.end_shapes, normal)

    def client(self, name: str, initial: Mapping[str, Tensor], guard: Guard | None = None) -> ClientModel:
        """Admit a client: it costs an adapter and an optimizer, and no copy of the base.

        Args:
            name: The client's, with a purpose where it is admitted more than once.
            initial: The adapter to start from.
            guard: What it does to what it sends across the cut; nothing when absent.
        """
        check_adapter(initial, self.shapes, whose=f"client {name}'s initial adapter")
        transport: Transport | None = None
        if self._connect is not None:
            transport = self._connect(name, self.plan)
            transport.set_adapter({tensor: initial[tensor] for tensor in self._middle_shapes})
        elif self.host is not None:
            self.host.admit(name, initial)
            transport = LocalTransport(self.host, name)
        if transport is not None:
            self._transports[name] = transport
        return ClientModel(
            self.input, self.output, transport, initial, self.training, self._in_flight, guard, self._rate_weight
        )

    def dismiss(self, name: str) -> None:
        """Let go of what the server's side keeps in memory for a client, if it was ever admitted."""
        if (transport := self._transports.pop(name, None)) is not None:
            transport.leave()

    def close(self) -> None:
        """Let go of what the server's side keeps for every client of this model."""
        for name in list(self._transports):
            self.dismiss(name)

    def stored_bytes(self) -> tuple[int, int | None]:
        """Bytes of frozen tensors on the client's side and on the server's; ``None`` where that is elsewhere."""
        client = self.backbone.client_bytes() + self.input.stored_bytes() + self.output.stored_bytes()
        if self.host is None:
            return client, 0 if self.plan.is_whole else None
        return client, self.host.stage.stored_bytes()
