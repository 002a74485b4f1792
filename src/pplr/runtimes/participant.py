"""A client of a federation that is ordered from elsewhere: it outlives every order, and keeps what is its own.

Its optimizer, its private tensors, its personal adapter and its best round never leave its folder. It keeps its state
from before and after every order of the last rounds, so a round that is ordered again, because the server was
restarted or too few clients answered, is trained again from where it began.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pplr.backbones.adapters import adapter_sha256, save_adapter
from pplr.errors import FederationError, WireError
from pplr.federation.checkpoints import Checkpoint, CheckpointStore
from pplr.federation.client import FederatedClient
from pplr.federation.decisions import Best
from pplr.recommend.evaluation import evaluate
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.parcels import HELLO, TEST, TRAIN, VALIDATE, Parcel
from pplr.runtimes.training_flops import training_flops
from pplr.stages.flops import Flops
from pplr.stages.transport import Traffic

__all__ = ["Participant"]

_KEPT = 6  # states of three rounds, before and after their mixing
_SAME = "Use the same version of pplr on both sides."


class Participant:
    """One client that takes orders.

    Args:
        assembly: The parts of the run, with this client's data.
        name: The client's name.
        state: Folder of its state; several processes may serve one client from it, one after the other.
        export: Folder for its best adapter when it is tested.
        note: Told of damaged states that are passed over.
    """

    def __init__(
        self, assembly: Assembly, name: str, state: Path, export: Path, note: Callable[[str], None] = lambda _: None
    ) -> None:
        self.name = name
        self._assembly = assembly
        self._config = assembly.config
        self._state, self._export = state, export
        self._store = CheckpointStore(state, keep=_KEPT, warn=note)
        self._client: FederatedClient | None = None
        self._stamp: str | None = None  # of the state in memory; None for the start
        self._phase = False

    def answer(self, order: Parcel) -> Parcel:
        """Carry out an order, and report.

        Raises:
            WireError: The order is not understood.
            FederationError: It does not fit this client, or training failed.
        """
        if order.kind == HELLO:
            return self._hello()
        if order.kind == TEST:
            return self._test(order)
        server_round = order.told.get("server_round")
        if order.kind not in (TRAIN, VALIDATE) or not isinstance(server_round, int) or server_round < 0:
            raise WireError(f"an order {order.kind!r} for server round {server_round!r}", cure=_SAME)
        return self._train(server_round, order) if order.kind == TRAIN else self._validate(server_round, order)

    def _hello(self) -> Parcel:
        """Say who this is, and what adapters start as here."""
        assembly = self._assembly
        initial = assembly.exchanged(assembly.initial)
        told = {
            "client": self.name,
            "hosted": sorted(self._hosted),
            "initial_sha256": adapter_sha256(initial),
            "model_sha256": assembly.backbone.fingerprint(),
            "catalog_sha256": assembly.data.dataset.catalog.sha256,
        }
        return Parcel(HELLO, told, initial)

    def _train(self, server_round: int, order: Parcel) -> Parcel:
        """Train from the ordered adapter; report the trained one."""
        client = self._client_at(2 * server_round)
        crossed = client.traffic
        self._enter(client, server_round)
        self._take(client, order)
        result = client.train(server_round, self._config, self._assembly.method, lambda _: None)
        exchanged = self._assembly.exchanged(client.model.own_adapter() if self._hosted else client.model.adapter())
        self._keep(client, 2 * server_round)
        told = self._answering(order, client, crossed) | {"result": asdict(result), "samples": len(client.encoded)}
        return Parcel(TRAIN, told, exchanged)

    def _validate(self, server_round: int, order: Parcel) -> Parcel:
        """Take the mixed adapter, measure it on this client's own validation cases, and remember the best round."""
        client = self._client_at(2 * server_round + 1)
        crossed = client.traffic
        self._enter(client, server_round)
        self._take(client, order)
        measured, improved = client.validate(server_round, self._config.evaluation.validation_metric)
        self._keep(client, 2 * server_round + 1, improved=improved)
        told = self._answering(order, client, crossed) | {"measured": dict(measured), "improved": improved}
        return Parcel(VALIDATE, told)

    def _answering(self, order: Parcel, client: FederatedClient, crossed: Traffic) -> dict[str, Any]:
        """Say which order is answered, and what crossed the cut for it."""
        traffic = client.traffic.since(crossed)
        told = {key: order.told.get(key) for key in ("server_round", "attempt")}
        return told | {"bytes_up": traffic.bytes_up, "bytes_down": traffic.bytes_down}

    def _test(self, order: Parcel) -> Parcel:
        """Write the best adapter as PEFT does, and measure it on this client's own test cases; means alone are told."""
        config, assembly = self._config, self._assembly
        client = self._client_at(None)
        checkpoint = self._store.newest()
        state = client.serving.adapter()
        if checkpoint is not None and client.best is not None:
            state = checkpoint.tensors(f"best-{self.name}")
        save_adapter(state, self._export, config.adapter, config.backbone.model, assembly.backbone.task)
        settings, cases = config.evaluation, {self.name: assembly.data.test[self.name]}
        model = assembly.admit(self.name, state, "test")
        try:
            found = evaluate(assembly.ranker(model), cases, settings.cutoffs, settings.batch_size)
        finally:
            assembly.dismiss(self.name, "test")
        client_bytes, server_bytes = assembly.model_of(self.name).stored_bytes()
        flops = self._flops(order.told.get("trained"))
        told = {
            "tested": found.by_client()[self.name],
            "stored_bytes": {"client": client_bytes, "server": server_bytes},
            "train_flops": None if flops is None else asdict(flops),
        }
        return Parcel(TEST, told)

    def _flops(self, trained: Any) -> Flops | None:
        """Work out what training took in the rounds that the server counts; ``None`` where it names none."""
        if trained is None:
            return None
        if not isinstance(trained, list) or not all(type(one) is int and one >= 0 for one in trained):
            raise WireError(f"an order to test after server rounds {str(trained)[:200]}", cure=_SAME)
        return training_flops(self._assembly, self.name, trained)

    # -- where the client stands --------------------------------------------------------------------------------

    def _enter(self, client: FederatedClient, server_round: int) -> None:
        """Enter a round; where a phase begins that keeps constants, go on from this client's own best round."""
        client.begin_round(server_round)
        kept = client.model.backbone.keeps_constants(server_round)
        if kept and not self._phase and server_round > 0 and client.best is not None:
            checkpoint = self._store.newest()
            if checkpoint is not None:
                client.serving.set_adapter(checkpoint.tensors(f"best-{self.name}"))
        self._phase = kept

    @property
    def _hosted(self) -> frozenset[str]:
        """Tensors on a stage server: they are mixed there, and are in no parcel."""
        return self._assembly.model_of(self.name).hosted_elsewhere

    def _take(self, client: FederatedClient, order: Parcel) -> None:
        """Go on with the adapter of an order: what is offered on the stage server, if there is one, and the rest.

        Raises:
            FederationError: The order has tensors that this client does not exchange, or does not say what is ready.
            TransportError: Nothing is offered under its label: the order is over.
        """
        label = order.told.get("offer")
        if bool(self._hosted) != isinstance(label, str):
            raise FederationError(
                f"client {self.name} {'has' if self._hosted else 'has not'} its middle blocks on a stage server, and "
                "is ordered as if it were the other way",
                cure=_SAME,
            )
        known = self._assembly.exchanged(self._assembly.initial).keys() - self._hosted
        if unknown := sorted(order.tensors.keys() - known):
            raise FederationError(
                f"client {self.name} is ordered to take {len(unknown)} tensors that it does not exchange, first "
                f"{unknown[0]}",
                cure="Use the same configuration on both sides.",
            )
        if isinstance(label, str):
            client.model.take_adapter(label)
        client.set_adapter(order.tensors)

    def _client_at(self, number: int | None) -> FederatedClient:
        """Bring the client to its newest state before a number; to its newest of all when that is absent."""
        stamp = self._newest_stamp(number)
        if self._client is not None and stamp == self._stamp:
            return self._client
        checkpoint = None if stamp is None else self._store.newest(number)
        if self._client is not None:
            self._assembly.dismiss(self.name)
            self._assembly.dismiss(self.name, "personal")
        client = self._assembly.federated_client(self.name)
        self._client, self._stamp, self._phase = client, None, False
        if checkpoint is not None:
            self._restore(client, checkpoint)
        return client

    def _newest_stamp(self, number: int | None) -> str | None:
        """Read which state is the newest before a number, without reading its tensors."""
        numbers = sorted((int(path.name) for path in self._state.glob("[0-9]*") if path.is_dir()), reverse=True)
        for found in numbers:
            if number is None or found <= number:
                try:
                    told = json.loads((self._state / f"{found:06d}" / "state.json").read_text(encoding="utf-8"))
                    return str(told["stamp"])
                except (OSError, ValueError, KeyError, TypeError):
                    return "unreadable"  # the store says what is wrong with it
        return None

    def _restore(self, client: FederatedClient, checkpoint: Checkpoint) -> None:
        client.restore(checkpoint.tensors(f"client-{self.name}"))
        best: Any = checkpoint.state["best"]
        client.best = None if best is None else Best(int(best[0]), best[1])
        self._stamp, self._phase = str(checkpoint.state["stamp"]), bool(checkpoint.state["phase"])

    def _keep(self, client: FederatedClient, number: int, *, improved: bool = False) -> None:
        """Write the client's state; states of later numbers, of a round that is done again, are dropped."""
        stamp = uuid.uuid4().hex
        best = client.best
        standing = {
            "stamp": stamp,
            "phase": self._phase,
            "best": None if best is None else [best.server_round, best.score],
        }
        own = {self.name: client.serving.adapter()} if improved else {}
        self._store.write(number, standing, {self.name: client.state()}, own)
        self._stamp = stamp
