"""A federation through Flower in which something is killed, or somebody is there who should not be."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from pplr.runtimes import in_process
from pplr.runtimes.identity import enroll_client, revoke
from tests.end_to_end.machines import LIMIT_S, Place, records

pytest.importorskip("flwr")


def test_a_node_that_is_killed_is_left_out_and_comes_back_with_its_own_adapter(machines: Place, tmp_path: Path) -> None:
    """The link takes it for alive for a minute after it was killed, and lets it in again then."""
    config = machines.config
    federation = config.federation.model_copy(update={"rounds": 11, "patience": None})
    runtime = config.runtime.model_copy(update={"deadline_s": 8.0})
    machines.config_file.write_text(config.model_copy(update={"federation": federation, "runtime": runtime}).to_yaml())
    machines.start_server()
    for name in machines.names:
        machines.start_client(name)
    run, state = tmp_path / "there", tmp_path / "client-1" / "runs"
    machines.start_training(run)
    machines.wait(lambda: any(state.glob("*/state/000002")), "training")
    machines.kill("client-1")
    machines.wait(lambda: "goes on without client 1: it did not answer" in machines.log("training"), "training")
    machines.start_client("1")
    assert machines.processes["training"].wait(LIMIT_S) == 0, machines.log("training")
    took_part = [set(record["clients"]) for record in records(run)]
    assert took_part[0] == {"0", "1", "2"}
    assert {"0", "2"} in took_part
    assert took_part[-1] == {"0", "1", "2"}
    assert set(json.loads((run / "metrics.json").read_text())["clients"]) == {"0", "1", "2"}


def test_whoever_should_not_be_there_is_kept_out_and_the_others_go_on(machines: Place, tmp_path: Path) -> None:
    """A client with a revoked kit, one with another's kit, and an enrolled one that sends NaN and huge updates."""
    enroll_client(machines.federation, "3", machines.root / "kits" / "3")
    revoke(machines.federation, "3")
    machines.start_server()
    for name in ("0", "1"):
        machines.start_client(name)
    machines.start_client("2", label="hostile")
    machines.wait(
        lambda: "is connected" in machines.log("client-0") and "is connected" in machines.log("client-1"), "client-0"
    )
    shutil.copytree(machines.root / "data" / "2", machines.root / "data" / "3")
    machines.start_client("3")  # revoked
    machines.start_client("2", kit="0", label="thief")  # the kit of a client that is there
    for name in ("client-3", "thief"):
        machines.wait(lambda name=name: "does not let this client in" in machines.log(name), name)
    done = machines.train(tmp_path / "there")
    assert done.code == 0, done.text() + "".join(map(machines.log, machines.processes))
    told = " ".join(done.text().split())  # as lines are broken anywhere
    assert "goes on without client 2: client 2's adapter: base_model" in told, told
    assert "holds NaN" in told, told
    assert "goes on without client 2: its update has norm" in told, told
    assert [set(record["clients"]) for record in records(tmp_path / "there")] == [{"0", "1"}, {"0", "1"}]
    for name in ("client-3", "thief"):
        assert "taking part" not in machines.log(name)
    honest = in_process.train(machines.config, tmp_path / "here")  # all three train there
    assert (
        honest.rounds[0]["clients"]["0"]["mixed_from"] != records(tmp_path / "there")[0]["clients"]["0"]["mixed_from"]
    )


def test_a_link_that_was_killed_is_started_again_and_the_run_goes_on(machines: Place, tmp_path: Path) -> None:
    """Between two rounds, with all clients in place: they join again by themselves, and nothing of the run is lost."""
    federation = machines.config.federation.model_copy(update={"rounds": 4, "patience": None})
    config = machines.config.model_copy(update={"federation": federation})
    machines.config_file.write_text(config.to_yaml())
    machines.start_server()
    for name in machines.names:
        machines.start_client(name)
    run = tmp_path / "there"
    machines.start_training(run)
    machines.wait(lambda: (run / "rounds.jsonl").exists() and len(records(run)) >= 1, "training")
    machines.kill("server")
    assert machines.processes.pop("training").wait(LIMIT_S) == 1
    assert "does not answer" in machines.log("training")
    machines.start_server()
    done = machines.train(run, "--resume")
    assert done.code == 0, done.text() + "".join(map(machines.log, machines.processes))
    assert "going on after server round" in done.text()
    here = in_process.train(config, tmp_path / "here")
    assert records(run) == records(here.folder)


def test_the_operators_part_of_the_link_is_closed_to_clients(machines: Place) -> None:
    """Who holds a kit and no secret can neither start a run, nor let a node in, nor take the server's tasks."""
    from pplr.runtimes.address import LinkAddress
    from pplr.runtimes.flower_enrolled import link_of
    from pplr.runtimes.flower_link import Operator, server_grid

    machines.start_server()
    link = link_of(machines.federation, machines.state)
    guessed = LinkAddress(link.address, link.ca_pem, b"0" * 64)
    with contextlib.closing(Operator(link)) as operator:
        assert len(operator.nodes()) == len(machines.names)  # the positive control
    refused = r"401|403|[Uu]nauth|[Aa]uthenticat"
    for ask in (Operator.nodes, Operator.start_run, lambda own: own.register(b"key"), lambda own: own.unregister(1)):
        with contextlib.closing(Operator(guessed)) as stranger, pytest.raises(Exception, match=refused):
            ask(stranger)
    with pytest.raises(Exception, match=refused), server_grid(guessed, 1):
        pass
