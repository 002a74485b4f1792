"""What can be asked of a stage server: one method for each request, each of which checks before it changes anything.

A method that refuses leaves the tenancy as it was. All run one at a time, whosever turn it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message
from torch import Tensor

from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.codec import Wire
from pplr.runtimes.stage_generation import Generations
from pplr.runtimes.stage_passes import TrainingPasses, refuse
from pplr.runtimes.stage_sessions import Session, Settings, check_optimizer
from pplr.runtimes.stage_state import Owner
from pplr.runtimes.stage_tenancies import Tenancies
from pplr.stages.cut import CutPlan
from pplr.stages.optimizer import LocalObjective

__all__ = ["OperatorCalls", "SessionCalls"]

_TENANT, _TENANT_BYTES = 64, 80  # so that it is the name of a folder, however it is written there
_WIRES = 8

Answers = Mapping[str, tuple[type[Message], Callable[..., Message]]]


class SessionCalls:
    """What a client can ask about its own tenancies.

    Args:
        tenancies: Of all clients.
        passes: Reads, computes and writes training passes.
        wires: Forms in which states may travel.
    """

    def __init__(self, tenancies: Tenancies, passes: TrainingPasses, wires: tuple[Wire, ...]) -> None:
        self._tenancies, self._passes, self._wires = tenancies, passes, wires
        self._limits, self._backbone = tenancies.limits, tenancies.backbone
        generations = Generations(tenancies, passes)
        self.answers: Answers = {
            "Forward": (pb.ForwardRequest, passes.forward),
            "Backward": (pb.BackwardRequest, passes.backward),
            "Discard": (pb.SimpleRequest, self._discard),
            "BeginRound": (pb.BeginRoundRequest, self._begin_round),
            "GradientNorm": (pb.NormRequest, self._gradient_norm),
            "OptimizerStep": (pb.StepRequest, self._optimizer_step),
            "EndRound": (pb.SimpleRequest, self._end_round),
            "OpenCache": (pb.SimpleRequest, generations.open_cache),
            "Decode": (pb.DecodeRequest, generations.decode),
            "AppendRows": (pb.AppendRequest, generations.append_rows),
            "CloseCache": (pb.CacheRequest, generations.close_cache),
            "Adapter": (pb.SimpleRequest, self._adapter),
            "SetAdapter": (pb.TensorsRequest, self._set_adapter),
            "OptimizerState": (pb.SimpleRequest, self._optimizer_state),
            "RestoreOptimizer": (pb.TensorsRequest, self._restore_optimizer),
            "Save": (pb.SimpleRequest, self._save),
            "Restore": (pb.SimpleRequest, self._restore),
            "TakeAdapter": (pb.TakeRequest, self._take_adapter),
            "Leave": (pb.SimpleRequest, self._leave),
        }

    def hello(self, client: str, request: Any) -> Any:
        """Open a session."""
        tenant = request.tenant
        if not (1 <= len(tenant) <= _TENANT and tenant.isprintable() and len(tenant.encode()) <= _TENANT_BYTES):
            refuse(
                f"a tenancy with a name of {len(tenant)} letters",
                f"Use 1 to {_TENANT} printable letters, and at most {_TENANT_BYTES} bytes of UTF-8.",
            )
        if request.base_sha256 != self._tenancies.base:
            refuse(
                "your bundle was cut from another base than this server's",
                "Use bundles of one `pplr cut`, or cuts of the same checkpoint in the same number format.",
            )
        plan = CutPlan(request.input_layers, request.output_layers, self._backbone.total_layers)
        if plan.is_whole or request.total_layers != plan.total_layers:
            refuse(
                f"a cut of {request.total_layers} blocks that leaves the server none of its {plan.total_layers}",
                "Cut the model that this server serves.",
            )
        if len(request.wires) > _WIRES:
            refuse(f"{len(request.wires)} forms in which states may travel", f"Name at most {_WIRES}.")
        wanted = [Wire.of(number) for number in request.wires]
        allowed = [wire for wire in wanted if wire in self._wires]
        if not allowed:
            refuse(
                f"states are to travel as {', '.join(wire.value for wire in wanted) or 'nothing'}, this server takes "
                + ", ".join(wire.value for wire in self._wires),
                "Set runtime.wire to one of these.",
            )
        try:
            adapter = AdapterConfig.model_validate_json(request.adapter_json)
            training = TrainingConfig.model_validate_json(request.training_json)
        except ValueError:
            refuse("unreadable adapter or training settings", "Use the same version on both sides.")
        owner, settings = Owner(client, request.tenant), Settings(plan, adapter, training)
        session = self._tenancies.open(owner, settings, allowed, request.attempt, keep=request.keep)
        return pb.HelloReply(
            session=session.number,
            wire=session.wire.number,
            max_message_bytes=self._limits.max_message_bytes,
            max_batch=self._limits.max_rows,
            max_tokens=self._limits.max_tokens,
            kept=session.kept_before,
        )

    # -- training ---------------------------------------------------------------------------------------------

    def _discard(self, session: Session, request: Any) -> Any:
        session.let_go()
        return pb.Done()

    def _begin_round(self, session: Session, request: Any) -> Any:
        anchor = None
        if request.has_anchor:
            anchor = self._tensors_in(session.name, request.anchor, session.host.stage.shapes, "anchor")
        if not (math.isfinite(request.proximal_mu) and request.proximal_mu >= 0 and request.total_steps >= 1):
            refuse("a round of no steps, or a pull that is no strength", "Use the client of this version.")
        objective = LocalObjective(proximal_mu=request.proximal_mu, train_a=request.train_a)
        session.host.begin_round(session.name, request.total_steps, objective, anchor)
        session.in_round = True
        return pb.Done()

    def _gradient_norm(self, session: Session, request: Any) -> Any:
        return pb.NormReply(squared=session.host.gradient_norm_squared(session.name))

    def _optimizer_step(self, session: Session, request: Any) -> Any:
        if not 0.0 <= request.scale <= 1.0:
            refuse("a clipping factor outside [0, 1]", "Look for a training that diverges.")
        session.host.optimizer_step(session.name, request.scale)
        return pb.Done()

    def _end_round(self, session: Session, request: Any) -> Any:
        session.host.end_round(session.name)
        session.in_round = False
        return pb.Done()

    # -- state ------------------------------------------------------------------------------------------------

    def _adapter(self, session: Session, request: Any) -> Any:
        return pb.TensorsReply(tensors=codec.encode_tensors(session.host.adapter(session.name)))

    def _tensors_in(
        self, whose: str, message: Any, expected: Mapping[str, tuple[int, ...]] | None, what: str
    ) -> dict[str, Tensor]:
        most = self._limits.max_message_bytes
        return codec.decode_tensors(message, expected, whose=f"{whose}'s {what}", max_bytes=most, max_norm=None)

    def _set_adapter(self, session: Session, request: Any) -> Any:
        _write_adapter(session, request.tensors, self._limits.max_message_bytes)
        return pb.Done()

    def _take_adapter(self, session: Session, request: Any) -> Any:
        self._tenancies.take(session, request.label)
        return pb.Done()

    def _optimizer_state(self, session: Session, request: Any) -> Any:
        return pb.TensorsReply(tensors=codec.encode_tensors(session.host.optimizer_state(session.name)))

    def _restore_optimizer(self, session: Session, request: Any) -> Any:
        tensors = self._tensors_in(session.name, request.tensors, None, "optimizer state")
        check_optimizer(tensors, session.host.stage.shapes)
        session.host.restore_optimizer(session.name, tensors)
        return pb.Done()

    def _save(self, session: Session, request: Any) -> Any:
        self._tenancies.save(session)
        return pb.Done()

    def _restore(self, session: Session, request: Any) -> Any:
        self._tenancies.restore(session)
        return pb.Done()

    def _leave(self, session: Session, request: Any) -> Any:
        self._tenancies.dismiss(session.owner)
        return pb.Done()


class OperatorCalls:
    """What an operator can ask about everybody's tenancies. Each can be asked twice with the same effect.

    Args:
        tenancies: Of all clients.
        now: The clock of their sessions.
        text: Writes the metrics.
    """

    def __init__(self, tenancies: Tenancies, now: Callable[[], float], text: Callable[[], str]) -> None:
        self._tenancies, self._now, self._text = tenancies, now, text
        self.answers: Answers = {
            "Tenancies": (pb.TenancyRequest, self._list),
            "ReadAdapter": (pb.TenancyRequest, self._read),
            "WriteAdapter": (pb.TenancyRequest, self._write),
            "OfferAdapter": (pb.TenancyRequest, self._offer),
            "SaveTenancy": (pb.TenancyRequest, self._save),
            "RestoreTenancy": (pb.TenancyRequest, self._restore),
            "DismissTenancy": (pb.TenancyRequest, self._dismiss),
            "Metrics": (pb.TenancyRequest, self._metrics),
        }

    def _of(self, request: Any) -> Session:
        for session in self._tenancies.of(request.client):
            if session.owner.tenant == request.tenant:
                return session
        known = ", ".join(str(session.owner) for session in self._tenancies.all()[:20]) or "none"
        raise TransportError(f"no tenancy {request.client}/{request.tenant} is in memory", cure=f"There are: {known}.")

    def _list(self, request: Any) -> Any:
        store = self._tenancies.store
        saved = set() if store is None else set(store.owners())
        now, reply = self._now(), pb.TenancyList()
        for session in sorted(self._tenancies.all(), key=lambda own: own.owner):
            plan = session.settings.plan
            reply.tenancies.add(
                client=session.owner.client,
                tenant=session.owner.tenant,
                input_layers=plan.input_layers,
                output_layers=plan.output_layers,
                rank=session.settings.adapter.rank,
                steps=int(session.host.optimizer_state(session.name)["steps"]),
                in_memory=True,
                on_disk=session.owner in saved,
                idle_s=max(0.0, now - session.used),
            )
        for owner in sorted(saved - {session.owner for session in self._tenancies.all()}):
            reply.tenancies.add(client=owner.client, tenant=owner.tenant, on_disk=True)
        return reply

    def _read(self, request: Any) -> Any:
        session = self._of(request)
        return pb.TensorsReply(tensors=codec.encode_tensors(session.host.adapter(session.name)))

    def _write(self, request: Any) -> Any:
        _write_adapter(self._of(request), request.tensors, self._tenancies.limits.max_message_bytes)
        return pb.Done()

    def _offer(self, request: Any) -> Any:
        whose = f"what is offered to {request.client}/{request.tenant}"
        most = self._tenancies.limits.max_message_bytes
        tensors = codec.decode_tensors(request.tensors, None, whose=whose, max_bytes=most, max_norm=None)
        self._tenancies.offer(Owner(request.client, request.tenant), request.label, tensors, self._now())
        return pb.Done()

    def _save(self, request: Any) -> Any:
        self._tenancies.save(self._of(request))
        return pb.Done()

    def _restore(self, request: Any) -> Any:
        self._tenancies.restore(self._of(request))
        return pb.Done()

    def _dismiss(self, request: Any) -> Any:
        self._tenancies.dismiss(self._of(request).owner)
        return pb.Done()

    def _metrics(self, request: Any) -> Any:
        return pb.TextReply(text=self._text())


def _write_adapter(session: Session, message: Any, max_bytes: int) -> None:
    """Read some or all tensors of a middle adapter and copy them in, or none of them."""
    given = {tensor.name for tensor in message.tensors}
    shapes = session.host.stage.shapes
    if unknown := sorted(given - shapes.keys()):
        refuse(f"{session.name}'s middle adapter has no {unknown[0][:100]!r}", "Send tensors of this cut's middle.")
    expected = {name: shape for name, shape in shapes.items() if name in given}
    tensors = codec.decode_tensors(
        message, expected, whose=f"{session.name}'s middle adapter", max_bytes=max_bytes, max_norm=None
    )
    session.host.set_adapter(session.name, tensors)
