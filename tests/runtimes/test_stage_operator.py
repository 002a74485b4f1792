"""What an operator can do to a running stage server, and how the server looks after itself and stops."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import ServerLostError, StorageError, TransportError
from pplr.federation import checkpoints
from pplr.runtimes.identity import enroll_client, init_federation, read_kit, read_server
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_client import GrpcTransport
from pplr.runtimes.stage_operator import StageOperator
from pplr.runtimes.stage_server import ServerLimits, StageServer
from pplr.stages.cut import CutPlan
from pplr.stages.optimizer import LocalObjective
from pplr.stages.stage import StageCall
from pplr.testing import refuses, same_state, tiny_backbone

BACKBONE = tiny_backbone()
BASE = BACKBONE.fingerprint()
PLAN, ADAPTER = CutPlan(1, 1, 4), AdapterConfig(rank=2)
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=0)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    init_federation(folder / "ca", "trees", ["localhost"], address="localhost:1")
    for name in ("one", "two"):
        enroll_client(folder / "ca", name, folder / name)
    enroll_client(folder / "ca", "olga", folder / "olga", role="operator")
    return folder


class House:
    """A server, and whoever is connected to it."""

    def __init__(self, federation: Path, stack: contextlib.ExitStack) -> None:
        self.federation, self.stack = federation, stack

    def serve(self, limits: ServerLimits | None = None, **options: Any) -> StageServer:
        self.server = StageServer(BACKBONE, read_server(self.federation / "ca"), "localhost:0", limits, **options)
        self.server.start()
        self.stack.callback(self._stop, self.server)
        return self.server

    @staticmethod
    def _stop(server: StageServer) -> None:
        if not server._stopped.is_set():
            server.stop(0.0)

    def channel(self, who: str) -> StageChannel:
        channel = StageChannel(f"localhost:{self.server.port}", read_kit(self.federation / who), patience_s=0.0)
        self.stack.callback(channel.close)
        return channel

    def operator(self) -> StageOperator:
        return StageOperator(self.channel("olga"))

    def client(self, who: str, tenant: str = "main", **options: Any) -> GrpcTransport:
        settings: dict[str, Any] = {"base_sha256": BASE, "width": 32, "adapter": ADAPTER, "training": TRAINING}
        return GrpcTransport(self.channel(who), tenant, PLAN, **(settings | options))


@pytest.fixture
def house(federation: Path) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        yield House(federation, stack)


def filled(transport: GrpcTransport, value: float) -> None:
    transport.set_adapter({name: torch.full_like(tensor, value) for name, tensor in transport.adapter().items()})


def train(transport: GrpcTransport, step: int = 1, *, end: bool = True) -> None:
    """Take an optimizer step."""
    transport.begin_round(9, LocalObjective(), None)
    states, lengths = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(step)), torch.tensor([3, 2])
    transport.forward(states, lengths, StageCall(), keep_as=step)
    transport.backward(step, states, lengths)
    transport.optimizer_step(1.0)
    if end:
        transport.end_round()


def wait_for(what: Callable[[], Any], within_s: float = 5.0) -> None:
    until = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


# -- an operator's calls -----------------------------------------------------------------------------------------


def test_lists_what_is_in_memory_and_on_disk(tmp_path, house) -> None:
    house.serve(state=tmp_path)
    operator = house.operator()
    assert operator.hosted() == []
    one = house.client("one")
    filled(one, 0.1)
    train(one)
    one.save()
    house.client("two", "best so far").leave()
    house.client("two", "second")
    first, second = operator.hosted()
    assert (first.client, first.tenant, first.cut, first.rank, first.steps) == ("one", "main", (1, 1), 2, 1)
    assert (first.in_memory, first.on_disk) == (True, True)
    assert 0.0 <= first.idle_s < 60.0
    assert (second.client, second.tenant, second.steps, second.on_disk) == ("two", "second", 0, False)
    one.leave()
    _, first = operator.hosted()  # what is on disk alone comes last
    assert (first.client, first.in_memory, first.on_disk) == ("one", False, True)


def test_reads_and_writes_an_adapter_and_no_other(house) -> None:
    house.serve()
    operator, one, two = house.operator(), house.client("one"), house.client("two")
    filled(one, 0.1)
    filled(two, 0.2)
    theirs = two.adapter()
    assert same_state(operator.adapter("one", "main"), one.adapter())
    name = next(iter(theirs))
    operator.set_adapter("one", "main", {name: torch.full_like(theirs[name], 7.0)})
    assert float(one.adapter()[name].sum()) == 7.0 * theirs[name].numel()
    assert all(float(tensor.max()) == pytest.approx(0.1) for other, tensor in one.adapter().items() if other != name)
    assert same_state(two.adapter(), theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cannot_poison_an_adapter(house, value) -> None:
    house.serve()
    operator, one = house.operator(), house.client("one")
    before = one.adapter()
    with refuses(TransportError, "not finite"):
        operator.set_adapter("one", "main", {name: tensor + value for name, tensor in before.items()})
    assert same_state(one.adapter(), before)


@pytest.mark.parametrize("call", ["adapter", "save", "restore", "dismiss"])
@pytest.mark.parametrize("owner", [("one", "other"), ("nobody", "main"), ("", ""), ("one/main", "")])
def test_what_is_not_there_is_an_error_that_says_what_is(tmp_path, house, call, owner) -> None:
    house.serve(state=tmp_path)
    house.client("one")
    with refuses(TransportError, "There are: one/main"):
        getattr(house.operator(), call)(*owner)


def test_saves_and_restores_adapter_and_optimizer(tmp_path, house) -> None:
    house.serve(state=tmp_path)
    operator, one, two = house.operator(), house.client("one"), house.client("two")
    for own in (one, two):
        filled(own, 0.1)
        train(own)
    operator.save("one", "main")
    adapter, optimizer, theirs = one.adapter(), one.optimizer_state(), two.adapter()
    train(one, 2)
    assert not same_state(one.adapter(), adapter)
    operator.restore("one", "main")
    assert same_state(one.adapter(), adapter)
    assert same_state(one.optimizer_state(), optimizer)
    assert same_state(two.adapter(), theirs)
    train(one, 2)  # and it goes on as it did
    ended = one.adapter()
    one.restore()
    train(one, 2)
    assert same_state(one.adapter(), ended)


def test_without_a_state_folder_nothing_is_saved(house) -> None:
    house.serve()
    one = house.client("one")
    for call in (one.save, one.restore, lambda: house.operator().save("one", "main")):
        with refuses(TransportError, "keeps no state on disk"):
            call()


def test_what_was_never_saved_cannot_be_restored(tmp_path, house) -> None:
    house.serve(state=tmp_path)
    one = house.client("one")
    before = one.adapter()
    with refuses(TransportError, "nothing is saved of one/main"):
        one.restore()
    assert same_state(one.adapter(), before)


def test_what_was_saved_with_other_settings_is_not_restored(tmp_path, house) -> None:
    house.serve(state=tmp_path)
    house.client("one").save()
    other = house.client("one", adapter=AdapterConfig(rank=3), keep=True)
    assert not other.kept
    with refuses(TransportError, "another base, cut or settings"):
        other.restore()


def test_a_damaged_state_folder_is_told_without_its_place(tmp_path, house, caplog) -> None:
    """The client learns that its server's disk is at fault, the operator where."""
    house.serve(state=tmp_path / "state")
    one = house.client("one")
    before = one.adapter()
    one.save()
    for path in (tmp_path / "state").rglob("*.safetensors"):
        path.write_bytes(b"")
    with refuses(TransportError, "Ask its operator"):
        one.restore()
    assert str(tmp_path) in caplog.text
    assert same_state(one.adapter(), before)
    with refuses(TransportError, str(tmp_path)):
        house.operator().restore("one", "main")


def test_dismisses_what_is_in_memory_and_leaves_the_disk(tmp_path, house) -> None:
    house.serve(state=tmp_path)
    operator, one, two = house.operator(), house.client("one"), house.client("two")
    filled(one, 0.5)
    one.save()
    kept = one.adapter()
    operator.dismiss("one", "main")
    with refuses(ServerLostError, "does not know this session"):
        one.adapter()
    with refuses(TransportError, "no tenancy one/main"):
        operator.dismiss("one", "main")
    assert two.adapter()
    again = house.client("one", keep=True)
    assert again.kept
    assert same_state(again.adapter(), kept)


def test_metrics_come_by_the_operators_connection_too(house) -> None:
    house.serve()
    house.client("one")
    assert 'pplr_stage_requests_total{client="one",code="OK",method="Hello"} 1.0' in house.operator().metrics()


# -- going on ----------------------------------------------------------------------------------------------------


def test_after_a_restart_a_client_goes_on_where_it_was_saved(tmp_path, house) -> None:
    house.serve(state=tmp_path)
    one, two = house.client("one"), house.client("two")
    filled(one, 0.1)
    train(one)
    adapter, optimizer = one.adapter(), one.optimizer_state()
    train(one, 2)
    ended = one.adapter()
    one.set_adapter(adapter)
    one.restore_optimizer(optimizer)
    assert two.adapter()
    house.server.stop(0.0)  # which saves
    house.serve(state=tmp_path)
    again = house.client("one", keep=True)
    assert again.kept
    assert same_state(again.adapter(), adapter)
    assert same_state(again.optimizer_state(), optimizer)
    train(again, 2)
    assert same_state(again.adapter(), ended)
    anew = house.client("one")
    assert not anew.kept
    assert int(anew.optimizer_state()["steps"]) == 0


def test_going_on_is_from_memory_if_it_is_there(tmp_path, house) -> None:
    house.serve(state=tmp_path)
    one = house.client("one")
    filled(one, 0.1)
    one.save()
    filled(one, 0.2)
    newer = one.adapter()
    again = house.client("one", keep=True)
    assert again.kept
    assert same_state(again.adapter(), newer)
    with refuses(ServerLostError):
        one.adapter()


# -- tidying up --------------------------------------------------------------------------------------------------


def test_idle_caches_and_passes_are_let_go(house) -> None:
    server = house.serve(ServerLimits(cache_ttl_s=0.1))
    one = house.client("one")
    filled(one, 0.1)
    kept = one.adapter()
    cache = one.open_cache()
    one.forward(torch.randn(1, 2, 32), torch.tensor([2]), StageCall(), keep_as=1)
    (session,) = server.tenancies.all()
    wait_for(lambda: not session.caches and not session.kept)
    assert not session.host._tenancies["one/main"].kept
    assert not session.host._tenancies["one/main"].caches
    with refuses(TransportError, f"no open cache {cache}"):
        one.decode(torch.randn(1, 1, 32), StageCall(attention_mask=torch.ones(1, 1, dtype=torch.long)), cache)
    with refuses(TransportError, "no forward pass of step 1"):
        one.backward(1, torch.randn(1, 2, 32), torch.tensor([2]))
    assert same_state(one.adapter(), kept)


def test_what_is_in_use_is_not_tidied(house) -> None:
    server = house.serve(ServerLimits(cache_ttl_s=60.0, idle_ttl_s=120.0))
    one = house.client("one")
    one.open_cache()
    (session,) = server.tenancies.all()
    assert server.tenancies.tidy(session.used + 59) == []
    assert session.caches
    assert server.tenancies.tidy(session.used + 61) == []
    assert not session.caches
    assert server.tenancies.all()
    assert server.tenancies.tidy(session.used + 121) == []
    assert not server.tenancies.all()
    assert server.tenancies.hosts == 0


def test_an_idle_tenancy_is_saved_and_let_go_and_comes_back(tmp_path, house) -> None:
    server = house.serve(ServerLimits(cache_ttl_s=0.1, idle_ttl_s=0.2), state=tmp_path)
    one = house.client("one")
    filled(one, 0.3)
    kept = one.adapter()
    wait_for(lambda: not server.tenancies.all())
    with refuses(ServerLostError, "does not know this session"):
        one.adapter()
    again = house.client("one", keep=True)
    assert again.kept
    assert same_state(again.adapter(), kept)


def test_an_idle_tenancy_that_cannot_be_saved_stays(tmp_path, house, monkeypatch) -> None:
    server = house.serve(ServerLimits(cache_ttl_s=60.0, idle_ttl_s=120.0), state=tmp_path)
    one, two = house.client("one"), house.client("two")
    filled(one, 0.3)
    write = checkpoints.CheckpointStore.write

    def fails(self: Any, *rest: Any) -> None:
        if "c-one" in str(self.folder):
            raise StorageError("no space left", cure="Free some.")
        write(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.CheckpointStore, "write", fails)
        (trouble,) = server.tenancies.tidy(time.monotonic() + 121)
    assert trouble.startswith("one/main: no space left")
    assert [session.owner.client for session in server.tenancies.all()] == ["one"]
    assert one.adapter()
    with refuses(ServerLostError):
        two.adapter()


def test_tidying_goes_on_after_an_error(house, monkeypatch, caplog) -> None:
    server = house.serve(ServerLimits(cache_ttl_s=0.05))
    tidied = []

    def fails(now: float) -> list[str]:
        tidied.append(now)
        raise OSError("/secret")

    monkeypatch.setattr(server.tenancies, "tidy", fails)
    wait_for(lambda: len(tidied) > 2)
    assert "could not be let go: OSError" in caplog.text
    assert house.client("one").adapter()


# -- stopping ----------------------------------------------------------------------------------------------------


def test_a_server_that_drains_begins_nothing_and_lets_a_round_end(house) -> None:
    server = house.serve()
    one, two = house.client("one"), house.client("two")
    filled(one, 0.1)
    train(one, end=False)
    assert two._channel.is_serving()
    ended = []
    drains = threading.Thread(target=lambda: ended.append(server.drain(10.0)))
    drains.start()
    wait_for(server._draining.is_set)
    wait_for(lambda: not two._channel.is_serving())
    with refuses(ServerLostError, "about to stop"):
        house.client("two", "new")
    with refuses(ServerLostError, "about to stop"):
        two.begin_round(3, LocalObjective(), None)
    assert not ended
    states, lengths = torch.randn(1, 2, 32), torch.tensor([2])
    one.forward(states, lengths, StageCall(), keep_as=2)
    one.backward(2, states, lengths)
    one.optimizer_step(1.0)
    one.end_round()
    drains.join(5)
    assert ended == [True]


def test_draining_waits_no_longer_than_granted(house) -> None:
    server = house.serve()
    one = house.client("one")
    one.open_cache()
    assert not server.drain(0.1)  # the cache stays open, so it returns only because its time is up
    assert one.adapter()  # until it stops


def test_stopping_saves_every_tenancy(tmp_path, house) -> None:
    server = house.serve(state=tmp_path)
    kept = {}
    for who, tenant in (("one", "main"), ("one", "second"), ("two", "main")):
        own = house.client(who, tenant)
        filled(own, len(kept) + 1)
        train(own)
        kept[who, tenant] = own.adapter(), own.optimizer_state()
    server.stop(0.0)
    house.serve(state=tmp_path)
    assert len(house.operator().hosted()) == 3
    for (who, tenant), (adapter, optimizer) in kept.items():
        again = house.client(who, tenant, keep=True)
        assert same_state(again.adapter(), adapter)
        assert same_state(again.optimizer_state(), optimizer)


@pytest.mark.parametrize("error", [StorageError("full", cure="Free some."), OSError("File name too long")])
def test_one_that_cannot_be_saved_does_not_keep_the_others_from_it(tmp_path, house, monkeypatch, error) -> None:
    server = house.serve(state=tmp_path)
    for who in ("one", "two"):
        house.client(who)
    write = checkpoints.CheckpointStore.write

    def fails(self: Any, *rest: Any) -> None:
        if "c-one" in str(self.folder):
            raise error
        write(self, *rest)

    monkeypatch.setattr(checkpoints.CheckpointStore, "write", fails)
    with pytest.raises(type(error)):
        server.stop(0.0)
    assert server.tenancies.store is not None
    assert server.tenancies.store.load(server.tenancies.of("two")[0].owner) is not None


def test_a_stopped_server_answers_nobody(house) -> None:
    server = house.serve()
    one = house.client("one")
    server.stop(0.0)
    with refuses(ServerLostError, "does not answer"):
        one.adapter()
    with refuses(ServerLostError, "does not answer"):
        one._channel.is_serving()
