"""A server and its clients in one process: what a client is sent and reports is bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pplr.config import Config
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.methods import make_method
from pplr.federation.server import FederationServer
from pplr.progress import Silent
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.middles import Middles
from pplr.runtimes.orders import OrderDesk, greeting
from pplr.runtimes.parcels import Parcel
from pplr.runtimes.participant import Participant
from pplr.runtimes.told_flops import SIDES, summed_flops

Answer = Callable[[str, bytes], bytes | None]


class Parties:
    """A server and its clients, each with an assembly of its own; what a client is sent and reports is bytes."""

    def __init__(self, config: Config, folder: Path, backbone) -> None:
        self.config, self.folder, self.backbone = config, folder, backbone
        self.notes: list[str] = []
        self.assembly = Assembly(config, Silent(), backbone)
        names = self.assembly.data.partition.names
        self.participants = {name: self.client(name) for name in names}
        self.restart_server()

    def client(self, name: str) -> Participant:
        own = Assembly(self.config, Silent(), self.backbone)
        return Participant(own, name, self.folder / "state" / name, self.folder / "clients" / name, self.notes.append)

    def restart_server(self) -> None:
        store = CheckpointStore(self.folder / "checkpoints", keep=2, warn=self.notes.append)
        initial = self.assembly.exchanged(self.assembly.initial)
        self.server = FederationServer(
            self.config, make_method(self.config.federation), list(self.participants), initial, store, self.notes.append
        )
        self.server.restore()
        dataset = self.assembly.data.dataset
        model, catalog = self.assembly.backbone.fingerprint(), dataset.catalog.sha256
        self.desk = OrderDesk(self.server, model, catalog, self.notes.append, *self.middles())

    def middles(self) -> tuple[Middles | None, Mapping[str, frozenset[str]]]:
        """Say where middle adapters are, and which tensors of each client these are: every client has its own here."""
        return None, {}

    def answer(self, name: str, order: bytes) -> bytes | None:
        return self.participants[name].answer(Parcel.unpack(order, whose="the server")).pack()

    def send(self, orders: Mapping[str, bytes], answer: Answer | None = None) -> list[tuple[str, bytes]]:
        replies = [(name, (answer or self.answer)(name, order)) for name, order in orders.items()]
        return [(name, reply) for name, reply in replies if reply is not None]

    def round(self, train: Answer | None = None, validate: Answer | None = None) -> None:
        while not self.desk.take_training(self.send(self.desk.training_orders(), train)):
            pass
        self.desk.take_validation(self.send(self.desk.validation_orders(), validate))

    def carry_out(self) -> None:
        for name in self.participants:
            self.desk.greet(name, self.answer(name, greeting(self.config)))
        while not self.server.is_finished:
            self.round()
        self.tests = self.desk.take_tests(self.send(self.desk.test_orders()))


def without_seconds(records):
    for record in records:
        for own in record["clients"].values():
            own.pop("seconds", None)
    return records


def same_run(parties: Parties, run) -> None:
    """Compare records, best adapters byte for byte, and test means with those of an in-process run."""
    assert without_seconds(parties.server.records) == without_seconds(run.rounds)
    for name in parties.participants:
        for path in sorted((run.folder / "clients" / name).iterdir()):
            assert (parties.folder / "clients" / name / path.name).read_bytes() == path.read_bytes()
        tested = dict(parties.tests[name]["tested"])
        assert tested == run.metrics["clients"][name]
    flops = summed_flops([parties.tests[name]["train_flops"] for name in parties.participants])
    assert flops == {side: run.metrics["cost"][side]["train_flops"] for side in SIDES}
    assert flops["whole"]


def altered(found: Parties, whom: str, change: Callable[[Parcel], Parcel]) -> Answer:
    def answer(name: str, order: bytes) -> bytes | None:
        reply = found.answer(name, order)
        return reply if name != whom or reply is None else change(Parcel.unpack(reply, whose=name)).pack()

    return answer
