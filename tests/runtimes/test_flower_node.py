"""A client on its own machine, and a server that has neither model nor data: what each believes of the other."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr")

from pplr.errors import FederationError, PplrError, WireError
from pplr.progress import Silent
from pplr.runtimes.flower_federation import _open_desk
from pplr.runtimes.flower_node import OwnClient
from pplr.runtimes.orders import greeting, read_start, run_token
from pplr.runtimes.parcels import HELLO, TRAIN, Parcel
from pplr.testing import refuses


@pytest.fixture
def config(small_config, model_folder: Path):
    return lambda *settings: small_config(f"backbone.model={model_folder}", "data.catalog=all", *settings)


@pytest.fixture
def client(tmp_path: Path, data_folder: Path):
    return lambda name="north": OwnClient(name, tmp_path / name, [f"data.path={data_folder}"], Silent())


@pytest.mark.parametrize("token", ["../../elsewhere", "", "x" * 16, "0" * 15, None])
def test_an_order_that_names_no_run_is_refused_and_touches_no_folder(client, tmp_path: Path, token) -> None:
    with refuses(WireError, "an order that names no run"):
        client()(None, Parcel(TRAIN, {"server_round": 0, "run": token}).pack())
    assert list(tmp_path.iterdir()) == []


def test_an_order_of_a_run_that_was_never_joined_is_refused(client) -> None:
    with refuses(WireError, "that this client never joined"):
        client()(None, Parcel(TRAIN, {"server_round": 0, "run": "0" * 16}).pack())


def test_a_client_reads_its_own_data_whatever_a_server_says(client, config, tmp_path: Path) -> None:
    """And one that was started again takes part in the run that an order names."""
    told = config(f"data.path={tmp_path / 'the server would like this'}")
    report = client()(None, greeting(told))
    start = read_start(report, whose="client north")
    assert Parcel.unpack(report, whose="client north").told["client"] == "north"
    order = Parcel(TRAIN, {"server_round": 0, "attempt": "a", "run": run_token(told.to_yaml())}, start.initial)
    trained = Parcel.unpack(client()(None, order.pack()), whose="client north")
    assert trained.told["result"]["samples"] > 0
    assert set(trained.tensors) == set(start.initial)


def test_a_configuration_that_cannot_be_used_is_refused(client) -> None:
    for told in ("data: [", "nothing: here", "- a list", "federation: {rounds: -1}"):
        with pytest.raises(PplrError):
            client()(None, Parcel(HELLO, {"config": told}).pack())


def test_a_server_takes_the_start_that_all_clients_have(client, config, tmp_path: Path) -> None:
    run = config("federation.clients=3", "training.samples=null")
    names = ("north", "south", "west")
    reports = {name: client(name)(None, greeting(run)) for name in names}
    desk = _open_desk(run, reports, tmp_path / "run", False, Silent())
    assert desk.server.names == names
    assert list(desk.training_orders()) == list(names)
    other = client("south")(None, greeting(config("federation.clients=3", "training.samples=null", "run.seed=7")))
    with refuses(FederationError, "client south has another model, catalog or start than 2 of the 3 clients"):
        _open_desk(run, reports | {"south": other}, tmp_path / "run", False, Silent())
    lied = Parcel.unpack(reports["west"], whose="west")
    tensors = {name: own + 1 for name, own in lied.tensors.items()}
    with refuses(FederationError, "client west tells another start than it sends"):
        _open_desk(run, reports | {"west": Parcel(HELLO, lied.told, tensors).pack()}, tmp_path / "run", False, Silent())
