"""Clients that take orders as bytes and whose middle blocks are on a stage server, by mutual TLS on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from pplr.backbones.adapters import block_of
from pplr.errors import FederationError, IdentityError, PplrError, ServerLostError, TransportError
from pplr.progress import Silent
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.identity import enroll_client, init_federation, read_kit, read_server
from pplr.runtimes.middles import Middles, StageMiddles
from pplr.runtimes.orders import greeting, read_start
from pplr.runtimes.parcels import TRAIN, VALIDATE, Parcel
from pplr.runtimes.participant import Participant
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_client import GrpcTransport
from pplr.runtimes.stage_operator import StageOperator
from pplr.runtimes.stage_server import StageServer
from pplr.stages.cut import CutPlan
from pplr.testing import refuses, same_state
from tests.runtimes.parties import Parties, altered, same_run

MIDDLE = 1  # the one block of three that is on the server


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    init_federation(folder / "ca", "trees", ["localhost"], address="localhost:1")
    for name in ("0", "1", "2"):
        enroll_client(folder / "ca", name, folder / name)
    enroll_client(folder / "ca", "olga", folder / "olga", role="operator")
    return folder


class HostedParties(Parties):
    """A federation whose middle blocks are on a stage server; each client connects by its own kit."""

    def __init__(self, config, folder: Path, backbone, federation: Path, **options) -> None:
        self.federation, self.options = federation, options
        self.stage: StageServer | None = None
        self.place = "localhost:0"
        self.seen: list[tuple[str, Parcel]] = []
        self._assemblies: list[Assembly] = []
        self._backbone = backbone
        self.start_stage()
        super().__init__(config, folder, backbone)

    def start_stage(self) -> None:
        self.stage = StageServer(self._backbone, read_server(self.federation / "ca"), self.place, **self.options)
        self.stage.start()
        self.place = f"localhost:{self.stage.port}"

    def client(self, name: str) -> Participant:
        at = StageServerAt(self.federation / name, self.place)
        own = Assembly(self.config, Silent(), self.backbone, at)
        self._assemblies.append(own)
        return Participant(own, name, self.folder / "state" / name, self.folder / "clients" / name, self.notes.append)

    def middles(self) -> tuple[Middles | None, Mapping[str, frozenset[str]]]:
        self.side = StageMiddles(self.federation / "olga", self.place)
        hosted = {}
        for name in self.participants:
            report = self.answer(name, greeting(self.config, hosted=True))
            hosted[name] = read_start(report, whose=f"client {name}").hosted
        return self.side, hosted

    def answer(self, name: str, order: bytes) -> bytes | None:
        reply = super().answer(name, order)
        self.seen += [(name, Parcel.unpack(order, whose="the server")), (name, Parcel.unpack(reply or b"", whose=name))]
        return reply

    def close(self) -> None:
        self.side.close()
        for assembly in self._assemblies:
            for connections in [assembly._connections]:
                if connections is not None:
                    connections.close()
        assert self.stage is not None
        self.stage.stop(0.0)


@pytest.fixture
def parties(tmp_path: Path, small_config, backbone, federation: Path) -> Iterator[Callable[..., HostedParties]]:
    made: list[HostedParties] = []

    def make(*settings: str, **options) -> HostedParties:
        made.append(HostedParties(small_config(*settings), tmp_path / str(len(made)), backbone, federation, **options))
        return made[-1]

    yield make
    for own in made:
        own.close()


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("federation.method=fedavg", "federation.participation=0.6", "federation.rounds=4"),
        ("federation.method=ditto",),
        ("training.optimizer_state=carry", "federation.rounds=3"),
    ],
    ids=lambda settings: " ".join(settings) or "pplr",
)
def test_gives_the_in_process_run_and_no_parcel_holds_a_middle_adapter(parties, finished, settings) -> None:
    found = parties(*settings)
    found.carry_out()
    same_run(found, finished(*settings))
    training = [parcel for _, parcel in found.seen if parcel.kind in (TRAIN, VALIDATE) and parcel.tensors]
    assert training
    assert {block_of(name) for parcel in training for name in parcel.tensors} == {0, 2}


def test_a_stage_server_that_was_started_anew_ends_no_run(parties, finished, tmp_path: Path) -> None:
    """What it held in memory is gone; each client brings its own back, and the round is ordered again."""
    settings = ("training.optimizer_state=carry", "federation.rounds=3")
    found = parties(*settings)
    found.round()
    found.stage.stop(0.0)
    found.start_stage()

    def begins_anew(name: str, order: bytes) -> bytes | None:
        try:
            return found.answer(name, order)
        except ServerLostError:  # as OwnClient does: the next order begins with new connections
            found.participants[name] = found.client(name)
            return None

    found.round(train=begins_anew)
    assert any("it is ordered again" in note for note in found.notes)
    found.carry_out()
    same_run(found, finished(*settings))


def test_a_client_that_was_started_again_goes_on_with_what_is_laid_ready(parties, finished) -> None:
    settings = ("training.optimizer_state=carry", "federation.rounds=3")
    found = parties(*settings)

    def started_again(name: str, order: bytes) -> bytes | None:
        found.participants[name] = found.client(name)
        return found.answer(name, order)

    found.round(train=started_again)
    found.round(validate=started_again)
    found.restart_server()
    found.carry_out()
    same_run(found, finished(*settings))


def test_an_order_that_is_over_trains_nothing(parties) -> None:
    """A client that was slow finds another label on the server, and the order ends there."""
    found = parties()
    late = found.desk.training_orders()["1"]
    newest = found.desk.training_orders()["1"]
    with refuses(TransportError, "no adapter is offered to 1/1"):
        found.answer("1", late)
    assert found.answer("1", newest) is not None  # the positive control


def test_nobody_takes_what_is_laid_ready_for_another(parties, federation: Path) -> None:
    found = parties()
    found.participants["1"]._client_at(None)
    found.side.offer("1", "for one", {name: own + 1 for name, own in found.side.read("1").items()})

    def transport(kit: str, tenant: str) -> GrpcTransport:
        channel = StageChannel(found.place, read_kit(federation / kit), patience_s=0.0)
        config = found.config
        return GrpcTransport(
            channel, tenant, CutPlan(1, 1, 3), base_sha256=found.backbone.fingerprint(), width=16,
            adapter=config.adapter, training=config.training,
        )  # fmt: skip

    for kit, tenant in (("0", "0"), ("0", "1"), ("1", "other")):
        before = transport(kit, tenant)
        held = {name: own.clone() for name, own in before.adapter().items()}
        with refuses(TransportError, "no adapter is offered"):
            before.take_adapter("for one")
        assert same_state(before.adapter(), held)
    own = transport("1", "1")
    held = {name: tensor.clone() for name, tensor in own.adapter().items()}
    own.take_adapter("for one")
    assert not same_state(own.adapter(), held)  # the positive control: it is there for its owner


@pytest.mark.parametrize("spoil", ["a tensor less", "another shape", "NaN"])
def test_what_is_laid_ready_and_does_not_fit_changes_nothing(parties, federation: Path, spoil: str) -> None:
    found = parties()
    operator = StageOperator(StageChannel(found.place, read_kit(federation / "olga"), patience_s=0.0))
    model = found.participants["1"]._client_at(None).model
    good = operator.adapter("1", "1")
    first = next(iter(good))
    bad = dict(good)
    if spoil == "a tensor less":
        del bad[first]
    else:
        bad[first] = torch.ones(7) if spoil == "another shape" else torch.full_like(good[first], float("nan"))

    def offer_and_take() -> None:
        operator.offer("1", "1", "here", bad)  # NaN is refused when it arrives, the rest when it is taken
        model.take_adapter("here")

    with pytest.raises(PplrError, match=r"offered to 1/1"):
        offer_and_take()
    assert same_state(operator.adapter("1", "1"), good)


def test_a_client_that_sends_what_is_on_the_server_is_left_out(parties) -> None:
    found = parties()

    def doubled(parcel: Parcel) -> Parcel:
        middle = found.side.read("1")
        return Parcel(parcel.kind, parcel.told, {**parcel.tensors, **middle})

    found.round(train=altered(found, "1", doubled))
    assert any("client 1 sends" in note and "which is on the stage server" in note for note in found.notes)
    assert set(found.server.records[0]["clients"]) == {"0", "2"}


def test_a_client_whose_middle_adapter_is_gone_is_left_out_and_comes_back(parties) -> None:
    found = parties()

    def leaves(name: str, order: bytes) -> bytes | None:
        reply = found.answer(name, order)
        if name == "1":
            found.participants["1"]._client_at(None).model.transport.leave()
        return reply

    found.round(train=leaves)
    assert any("no tenancy 1/1 is in memory" in note for note in found.notes)
    assert set(found.server.records[0]["clients"]) == {"0", "2"}
    found.participants["1"] = found.client("1")
    found.round()
    assert set(found.server.records[1]["clients"]) == {"0", "1", "2"}


def test_a_poisoned_middle_adapter_is_left_out_at_the_door(parties) -> None:
    """A client may write its own middle adapter as it likes; it is checked as if it had been sent."""
    found, silent = parties(), parties()

    def grows(name: str, order: bytes) -> bytes | None:
        reply = found.answer(name, order)
        if name == "1":
            transport = found.participants["1"]._client_at(None).model.transport
            transport.set_adapter({key: own * 1e5 for key, own in transport.adapter().items()})
        return reply

    found.round(train=grows)
    silent.round(train=lambda name, order: None if name == "1" else silent.answer(name, order))
    assert any("client 1" in note and "times the round's median" in note for note in found.notes)
    for name in ("0", "2"):
        assert same_state(found.server.adapter_of(name), silent.server.adapter_of(name))


def test_orders_fit_where_the_middle_blocks_are(parties, small_config, tmp_path: Path, backbone) -> None:
    found, here = parties(), Parties(small_config(), tmp_path / "here", backbone)
    with refuses(FederationError, "has its middle blocks on a stage server, and is ordered as if"):
        found.answer("1", here.desk.training_orders()["1"])
    with refuses(FederationError, "has not its middle blocks on a stage server"):
        here.answer("1", found.desk.training_orders()["1"])


def test_a_run_without_a_stage_server_takes_no_client_that_has_one(parties) -> None:
    from pplr.runtimes.orders import OrderDesk

    found = parties()
    with refuses(FederationError, "clients have middle blocks on a stage server, and this run has none"):
        OrderDesk(found.server, "", "", found.notes.append, None, found.middles()[1])


def test_only_an_operators_kit_reads_and_lays_ready(parties, federation: Path) -> None:
    found = parties()
    with refuses(IdentityError, "is the kit of client 1"):
        StageMiddles(federation / "1", found.place)
