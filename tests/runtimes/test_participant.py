"""Clients that take orders as bytes: what comes of it is what the in-process run gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pplr.errors import FederationError, PartitionError, WireError
from pplr.progress import Silent
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.orders import greeting, read_hello
from pplr.runtimes.parcels import TRAIN, Parcel
from pplr.runtimes.participant import Participant
from pplr.testing import refuses, same_state
from tests.runtimes.parties import Parties, altered, same_run


class OwnParties(Parties):
    """The same, but every client has a folder with its own users' data and nobody else's."""

    def client(self, name: str) -> Participant:
        whole, folder = self.config.data.path, self.folder / "data" / name
        assert whole is not None
        if not folder.exists():
            dataset = self.assembly.data.dataset
            users = self.assembly.data.partition.users[self.assembly.data.partition.names.index(name)]
            kept = {dataset.user_ids[user] for user in users}
            folder.mkdir(parents=True)
            shutil.copy(whole / "tiny.item", folder)
            for part in ("tiny.user", "tiny.inter"):
                header, *lines = (whole / part).read_text().splitlines(keepends=True)
                (folder / part).write_text(header + "".join(line for line in lines if line.split("\t")[0] in kept))
        config = self.config.model_copy(update={"data": self.config.data.model_copy(update={"path": folder})})
        own = Assembly(config, Silent(), self.backbone, own=name)
        assert own.data.partition.names == (name,)
        return Participant(own, name, self.folder / "state" / name, self.folder / "clients" / name, self.notes.append)


@pytest.fixture
def parties(tmp_path: Path, small_config, backbone) -> Callable[..., Parties]:
    return lambda *settings: Parties(small_config(*settings), tmp_path / f"{len(list(tmp_path.iterdir()))}", backbone)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("federation.method=fedavg", "federation.participation=0.6", "federation.rounds=4"),
        ("federation.method=ditto",),
        ("federation.method=local",),
        ("federation.averaging=freeze_a", "federation.participation=0.6", "federation.rounds=3"),
        ("training.optimizer_state=carry", "federation.rounds=3"),
    ],
    ids=lambda settings: " ".join(settings) or "pplr",
)
def test_ordered_clients_give_the_in_process_run(parties, finished, settings) -> None:
    found = parties(*settings)
    found.carry_out()
    same_run(found, finished(*settings))


def test_clients_that_hold_their_own_data_alone_give_the_in_process_run(
    small_config, tmp_path, finished, backbone
) -> None:
    """Nothing that a client needs is in another's data: its holdout, its samples and its draws are its own."""
    settings = (
        "data.catalog=all",
        "training.samples=null",
        "evaluation.test_users=null",
        "evaluation.validation_users=3",
    )
    found = OwnParties(small_config(*settings), tmp_path, backbone)
    found.carry_out()
    same_run(found, finished(*settings))


def test_a_client_with_too_few_users_of_its_own_is_refused(small_config) -> None:
    with refuses(PartitionError, "client north has 24 users with a training sample, and needs 99"):
        Assembly(small_config("data.partition.min_users=99"), Silent(), own="north")


def test_pooled_data_are_no_federation(parties) -> None:
    with refuses(FederationError, "pools all data in one place"):
        parties("federation.method=centralized")


def test_a_server_that_was_killed_goes_on_from_the_last_whole_round(parties, finished) -> None:
    """Its clients have trained the next round already; they go back to where it began."""
    found = parties("federation.rounds=3", "training.optimizer_state=carry")
    found.round()
    found.send(found.desk.training_orders())
    found.restart_server()
    assert found.server.next_round == 1
    found.round()
    found.restart_server()
    found.carry_out()
    same_run(found, finished("federation.rounds=3", "training.optimizer_state=carry"))


def test_a_client_that_was_killed_goes_on_from_its_own_folder(parties, finished) -> None:
    found = parties("federation.rounds=3", "training.optimizer_state=carry")

    def killed_after(name: str, order: bytes) -> bytes | None:
        reply = found.answer(name, order)
        if name == "1":
            found.participants[name] = found.client(name)
        return reply

    found.round(train=killed_after)
    found.round(validate=killed_after)
    found.carry_out()
    same_run(found, finished("federation.rounds=3", "training.optimizer_state=carry"))


def test_two_processes_may_serve_one_client_in_turn(parties, finished) -> None:
    """As the actors of a simulation do."""
    found = parties("federation.rounds=3")
    twins = {name: (found.client(name), found.client(name)) for name in found.participants}
    turn = iter(range(1000))

    def either(name: str, order: bytes) -> bytes:
        return twins[name][next(turn) % 2].answer(Parcel.unpack(order, whose="the server")).pack()

    found.answer = either  # type: ignore[method-assign]
    found.carry_out()
    same_run(found, finished("federation.rounds=3"))


def test_a_client_that_vanishes_is_left_out_and_comes_back_with_its_own_adapter(parties) -> None:
    found = parties("federation.rounds=3")
    found.round()
    before = {key: own.clone() for key, own in found.server.adapter_of("2").items()}
    found.round(train=lambda name, order: None if name == "2" else found.answer(name, order))
    assert set(found.server.records[1]["clients"]) == {"0", "1"}
    assert all(set(own["mixed_from"]) == {"0", "1"} for own in found.server.records[1]["clients"].values())
    assert any("goes on without client 2: it did not answer" in note for note in found.notes)
    assert same_state(found.server.adapter_of("2"), before)
    found.round()
    assert set(found.server.records[2]["clients"]) == {"0", "1", "2"}


def test_a_report_that_comes_twice_counts_once(parties) -> None:
    found, once = parties(), parties()
    late = altered(found, "1", scaled(2.0))("1", dict(found.desk.training_orders())["1"])  # of another attempt
    assert late is not None
    orders = found.desk.training_orders()
    reports = found.send(orders)
    again = altered(found, "1", scaled(2.0))("1", orders["1"])
    assert again is not None
    assert found.desk.take_training([*reports, ("1", again), ("1", late)])
    found.desk.take_validation(found.send(found.desk.validation_orders()))
    once.round()
    assert any("client 1 reports a training that nobody waits for" in note for note in found.notes)
    assert any("client 1 answers an order that is over" in note for note in found.notes)
    for name in found.participants:
        assert same_state(found.server.adapter_of(name), once.server.adapter_of(name))


def test_a_round_with_too_few_reports_is_ordered_again_and_then_given_up(parties) -> None:
    found = parties("federation.rounds=2", "runtime.attempts=3", "federation.fewest=2")
    asked: list[str] = []

    def only_one(name: str, order: bytes) -> bytes | None:
        asked.append(name)
        return found.answer(name, order) if name == "0" or len(asked) > 3 else None

    found.round(train=only_one)  # the second attempt has all
    assert len(asked) == 6
    assert any("it is ordered again" in note for note in found.notes)
    standing = found.server.adapter_of("0")
    with refuses(FederationError, "server round 2 has 1 usable updates of 3"):
        found.round(train=lambda name, order: found.answer(name, order) if name == "0" else None)
    assert found.server.next_round == 1
    assert same_state(found.server.adapter_of("0"), standing)


def poisoned(value: float) -> Callable[[Parcel], Parcel]:
    def change(parcel: Parcel) -> Parcel:
        tensors = {name: own.clone() for name, own in parcel.tensors.items()}
        next(iter(tensors.values())).view(-1)[3] = value
        return Parcel(parcel.kind, parcel.told, tensors)

    return change


def scaled(factor: float) -> Callable[[Parcel], Parcel]:
    return lambda parcel: Parcel(parcel.kind, parcel.told, {k: own * factor for k, own in parcel.tensors.items()})


def retold(**fields) -> Callable[[Parcel], Parcel]:
    return lambda parcel: Parcel(parcel.kind, dict(parcel.told) | fields, parcel.tensors)


def renamed(parcel: Parcel) -> Parcel:
    (first, *_), tensors = parcel.tensors, dict(parcel.tensors)
    tensors["another"] = tensors.pop(first)
    return Parcel(parcel.kind, parcel.told, tensors)


def reshaped(parcel: Parcel) -> Parcel:
    first = next(iter(parcel.tensors))
    return Parcel(parcel.kind, parcel.told, dict(parcel.tensors) | {first: parcel.tensors[first].t().contiguous()})


def narrowed(parcel: Parcel) -> Parcel:
    return Parcel(parcel.kind, parcel.told, {name: own.bfloat16() for name, own in parcel.tensors.items()})


RESULT = {"samples": 1, "steps": 1, "tokens": 1, "targets": 1, "loss": 1.0, "seconds": 1.0}
HOSTILE = {
    "NaN": (poisoned(float("nan")), "holds NaN"),
    "infinite": (poisoned(float("inf")), "holds NaN or infinite"),
    "a thousand times too large": (scaled(1e5), "times the round's median"),
    "unknown name": (renamed, "lacks 1 tensors"),
    "another shape": (reshaped, "expected"),
    "another dtype": (narrowed, "bfloat16, expected torch.float32"),
    "another kind": (lambda parcel: Parcel("validate", parcel.told, parcel.tensors), "answered 'validate'"),
    "another round": (retold(server_round=7), "answers an order that is over"),
    "an earlier attempt": (retold(attempt="0" * 32), "answers an order that is over"),
    "negative samples": (retold(samples=-5), "which counts nothing"),
    "no samples": (retold(samples=0), "which no training gives"),
    "a true as a number": (retold(samples=True), "which counts nothing"),
    "no result": (retold(result=None), "does not tell how its training went"),
    "a loss of words": (retold(result=RESULT | {"loss": "low"}), "which is no number"),
    "a negative loss": (retold(result=RESULT | {"loss": -1.0}), "which no training gives"),
    "samples beyond all numbers": (retold(samples=10**400), "which counts nothing"),
    "a loss beyond all numbers": (retold(result=RESULT | {"loss": 10**400}), "which is no number"),
    "another field": (retold(result=RESULT | {"more": 1}), "does not tell how its training went"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_client_may_not_send_is_left_out_by_name_and_changes_nobody(parties, what: str) -> None:
    """The others end as they do when the hostile client does not answer at all."""
    change, reason = HOSTILE[what]
    found, silent = parties(), parties()
    found.round(train=altered(found, "1", change))
    silent.round(train=lambda name, order: None if name == "1" else silent.answer(name, order))
    assert any(reason in note and ("client 1" in note) for note in found.notes), found.notes
    for name in ("0", "2"):
        assert same_state(found.server.adapter_of(name), silent.server.adapter_of(name))
    honest = parties()
    honest.round()
    one, other = honest.server.adapter_of("0"), silent.server.adapter_of("0")
    assert any(not torch.equal(one[key], other[key]) for key in one)  # the comparison can see a difference


def told_raw(parcel: Parcel, before: str, after: str) -> bytes:
    """Write what Python's own JSON would not: the header is patched to the same length."""
    data = parcel.pack()
    assert data.count(before.encode()) == 1
    assert len(before) == len(after)
    return data.replace(before.encode(), after.encode())


MEASURED: dict[str, object] = {
    "an unknown metric": {"loss": 1.0, "more": 1.0},
    "no metric": {},
    "words": {"loss": "low"},
    "a truth": {"loss": True},
    "beyond all numbers": {"loss": 10**400},
    "a list": [1.0],
}


@pytest.mark.parametrize("what", MEASURED)
def test_a_validation_that_cannot_be_is_passed_over_and_ends_nothing(parties, what: str) -> None:
    found = parties()
    found.round(validate=altered(found, "1", retold(measured=MEASURED[what])))
    assert any("client 1 tells" in note and "of its validation" in note for note in found.notes)
    assert found.server.records[0]["clients"]["1"]["validation"] == {}
    assert found.server.records[0]["clients"]["0"]["validation"]["loss"] > 0
    assert set(found.server.best) == {"0", "2"}


def test_an_infinity_that_json_can_write_ends_nothing(parties) -> None:
    found = parties()

    def infinite(name: str, order: bytes) -> bytes | None:
        if name != "1":
            return found.answer(name, order)
        parcel = Parcel.unpack(found.answer(name, order) or b"", whose=name)
        return told_raw(Parcel(parcel.kind, dict(parcel.told) | {"measured": {"loss": 12345.0}}), "12345.0", "1.0e999")

    found.round(validate=infinite)
    assert any("client 1 tells {'loss': inf}" in note for note in found.notes)
    assert found.server.next_round == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"tested": None},
        {"tested": {"users": 3}},
        {"stored_bytes": None},
        {"stored_bytes": {"client": None, "server": 1}},
        {"stored_bytes": {"client": 1, "server": "much"}},
        {"train_flops": 5},
        {"train_flops": {"client": 1, "server": 2}},
        {"train_flops": {"client": 1, "server": -2, "whole": 1}},
    ],
)
def test_a_test_that_cannot_be_is_passed_over_and_ends_nothing(parties, fields) -> None:
    found = parties("federation.rounds=1")
    found.round()
    reports = found.send(found.desk.test_orders(), altered(found, "1", retold(**fields)))
    assert set(found.desk.take_tests(reports)) == {"0", "2"}
    assert any("client 1" in note for note in found.notes)


@pytest.mark.parametrize("garbage", [b"", b"\0" * 8, b"\xff" * 64, b"not a parcel at all", b"\x02\0\0\0\0\0\0\0{}"])
def test_bytes_that_are_no_parcel_are_refused(parties, garbage: bytes) -> None:
    with pytest.raises(WireError, match="the server sent"):
        Parcel.unpack(garbage, whose="the server")
    found = parties()
    found.round(train=lambda name, order: garbage if name == "1" else found.answer(name, order))
    assert set(found.server.records[0]["clients"]) == {"0", "2"}


def test_a_parcel_is_bounded() -> None:
    parcel = Parcel(TRAIN, {"server_round": 0}, {"x": torch.zeros(4, dtype=torch.bfloat16)})
    data = parcel.pack()
    found = Parcel.unpack(data, whose="0")
    assert (found.kind, found.told) == (TRAIN, {"server_round": 0})
    assert found.tensors["x"].dtype == torch.bfloat16
    with refuses(WireError, "more than 10"):
        Parcel.unpack(data, whose="0", max_bytes=10)
    with refuses(WireError, "torch.uint8, which no adapter is"):
        Parcel.unpack(Parcel(TRAIN, {}, {"x": torch.zeros(4, dtype=torch.uint8)}).pack(), whose="0")
    with pytest.raises(ValueError, match="JSON"):
        Parcel(TRAIN, {"loss": float("nan")}).pack()
    nan = data.replace(b'{\\"server_round\\": 0}', b'{\\"server_round\\":NaN')
    assert nan != data
    with pytest.raises(WireError):
        Parcel.unpack(nan, whose="0")


def test_a_client_says_who_it_is_and_what_it_starts_from(parties, small_config, backbone, tmp_path) -> None:
    found = parties()
    hello = found.answer("1", greeting(found.config))
    assert read_hello(hello, whose="a node") == "1"
    other = Parties(small_config("run.seed=5"), tmp_path / "other", backbone)
    with refuses(FederationError, "client 1 has another initial than the server"):
        found.desk.greet("1", other.answer("1", greeting(found.config)))


def test_a_client_takes_no_order_that_does_not_fit(parties) -> None:
    found = parties()
    client = found.participants["0"]
    for order in (Parcel("erase"), Parcel(TRAIN), Parcel(TRAIN, {"server_round": -1})):
        with refuses(WireError, "for server round"):
            client.answer(order)
    with refuses(FederationError, "tensors that it does not exchange"):
        client.answer(Parcel(TRAIN, {"server_round": 0}, {"another": torch.zeros(1)}))


def test_a_damaged_state_is_passed_over_for_the_one_before(parties) -> None:
    found = parties("federation.rounds=3")
    found.round()
    newest = max((found.folder / "state" / "0").iterdir())
    (newest / "client-0.safetensors").write_bytes(b"damaged")
    found.participants["0"] = found.client("0")
    found.round()
    assert any("is damaged" in note for note in found.notes)
    assert set(found.server.records[1]["clients"]) == {"0", "1", "2"}
    shutil.rmtree(found.folder)


def test_clients_say_what_their_training_took_in_the_rounds_that_count(parties) -> None:
    found = parties("federation.rounds=1")
    found.round()
    told = found.desk.take_tests(found.send(found.desk.test_orders()))
    assert found.notes == []
    for own in told.values():
        flops = own["train_flops"]
        assert flops["client"] + flops["server"] == flops["whole"] > 0
    orders = found.desk.test_orders()
    order = Parcel.unpack(orders["1"], whose="the server")
    assert order.told["trained"] == [0]
    with pytest.raises(WireError, match="after server rounds"):
        found.participants["1"].answer(Parcel(order.kind, dict(order.told) | {"trained": ["x"]}))
