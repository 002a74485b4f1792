"""Servers and clients that are killed, cut off and spoken to twice: a run that goes on ends with the same bytes.

Every server and every client is a process of its own, on loopback, with mutual TLS. The truth is the same run in one
process with the whole model, never disturbed.
"""

from __future__ import annotations

import json
import random
import re
import runpy
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pplr.backbones.bundles import write_bundles
from pplr.config import Config
from pplr.runtimes.identity import enroll_client, init_federation
from tests.end_to_end.commands import Command, Driver, Fault

pytestmark = pytest.mark.slow

Proxy = runpy.run_path(str(Path(__file__).with_name("fault_proxy.py")))["Proxy"]

LIMIT_S = 60.0
ROUNDS, CLIENTS, STEPS = 2, 3, 3
PASSES = 2 * STEPS
"""Forward passes with gradient of one client in one round: two micro-batches a step."""
SETTINGS = (
    f"federation.rounds={ROUNDS}",
    "federation.patience=null",
    "training.samples=36",
    "training.micro_batch_size=2",
    "adapter.dropout=0.2",
    "backbone.prompt.instruction=Name the next.",
    "backbone.max_tokens=256",
    "evaluation.beams=2",
    "evaluation.max_new_tokens=2",
    "evaluation.test_users=3",
    "evaluation.validation_users=1",
)
PLACES = {
    "StageHost": "pplr.stages.host",
    "GrpcTransport": "pplr.runtimes.stage_client",
    "StageChannel": "pplr.runtimes.stage_channel",
    "CheckpointStore": "pplr.federation.checkpoints",
}
IMPATIENT = {"do": "patience", "patience_s": 1.0}


# -- processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    folder = tmp_path_factory.mktemp("faults")
    environment = {
        "PPLR_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    made = Driver(folder, environment, threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(driver: Driver, small_config: Callable[..., Config], model_folder: Path) -> Path:
    """The folder of all commands: two configurations that differ in the model's folder, its bundles, kits."""
    folder = driver.folder
    write_bundles(model_folder, folder / "bundles", input_layers=1, output_layers=1)
    init_federation(folder / "ca", "trees", ["localhost"], address="localhost:1")
    enroll_client(folder / "ca", "site", folder / "kit")
    enroll_client(folder / "ca", "olga", folder / "operator", role="operator")
    for name, model in (("whole", model_folder), ("trees", folder / "bundles" / "client")):
        (folder / f"{name}.yaml").write_text(small_config(f"backbone.model={model}", *SETTINGS).to_yaml())
    return folder


@pytest.fixture(scope="module")
def truth(driver: Driver, place: Path) -> dict[str, Any]:
    """What the run comes to in one process, undisturbed."""
    done = driver.start("train", "whole.yaml", "--run-dir", "whole")
    assert done.wait() == 0, done.text()
    return outcome(place / "whole")


class Site:
    """Servers and clients of one test, which end with it."""

    def __init__(self, driver: Driver, place: Path) -> None:
        self._driver, self._place = driver, place
        self._commands: list[Command] = []
        self.port = 0  # of the newest server; the next one takes the same
        self.run = driver.fresh("run")

    def start(self, *arguments: str, faults: tuple[Fault, ...] = ()) -> Command:
        """Start a command that ends with the test."""
        self._commands.append(self._driver.start(*arguments, faults=faults))
        return self._commands[-1]

    def serve(self, *faults: Fault, options: tuple[str, ...] = ()) -> Command:
        """Start a server, where the one before it listened."""
        command = ("stage", "serve", "bundles/server", "--federation", "ca", "--dtype", "float32", "--threads", "1")
        server = self.start(*command, "--listen", f"localhost:{self.port}", *options, faults=faults)
        told = server.until(lambda: re.search(r" on localhost:(\d+)", server.out.read_text()))
        self.port = int(told[1])
        return server

    def there(self, port: int | None = None, kit: str = "kit") -> tuple[str, ...]:
        """Say where a client finds the server."""
        return "--stage-server", f"localhost:{port or self.port}", "--kit", kit

    def train(self, *faults: Fault, resume: bool = False, port: int | None = None) -> Command:
        """Start a client."""
        again = ("--resume",) if resume else ()
        return self.start("train", "trees.yaml", "--run-dir", str(self.run), *self.there(port), *again, faults=faults)

    def resume(self) -> None:
        """Go on to the end."""
        well(self.train(resume=True))

    def marker(self) -> Path:
        return self._driver.fresh("marker")

    def end(self) -> None:
        for command in self._commands:
            command.kill()


@pytest.fixture
def site(driver: Driver, place: Path) -> Iterator[Site]:
    made = Site(driver, place)
    yield made
    made.end()


@pytest.fixture(scope="module")
def calm(driver: Driver, place: Path, truth: dict[str, Any]) -> Path:
    """The folder of a finished run over a server that nothing happened to."""
    site = Site(driver, place)
    site.serve()
    well(site.train())
    site.end()
    return site.run


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened on the way, which is all but times, memory and places."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        rows = {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in record["clients"].items()}
        return record | {"clients": rows}

    files = [*folder.glob("clients/*/*.safetensors"), *folder.glob("checkpoints/*/*.safetensors")]
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "bytes": {str(path.relative_to(folder)): path.read_bytes() for path in files},
        "rounds": [timeless(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()],
        "evaluation": json.loads((folder / "evaluation.json").read_text()),
        "metrics": {name: metrics[name] for name in ("overall", "clients", "spread", "floors")},
        "wire": metrics["cost"]["wire"],
    }


def fault(do: str, methods: str, at: int = 0, when: str = "before", file: Path | None = None) -> Fault:
    """Name a fault of some methods, written as ``Class.one Class.other``."""
    on = [f"{PLACES[name.split('.')[0]]}:{name}" for name in methods.split()]
    return {"do": do, "on": on, "at": at, "when": when, "file": str(file)}


def well(command: Command) -> None:
    """Check that a command came to its end and complained of nothing."""
    assert command.wait() == 0, command.text()
    assert command.err.read_text() == ""


def lost(client: Command, port: int, what: str = "does not answer") -> None:
    """Check that a client ended with one line that says which server was lost, and what to do."""
    assert client.wait() == 1, client.text()
    (line,) = client.err.read_text().splitlines()
    assert line.startswith(f"error: the stage server localhost:{port} {what}"), line
    assert "--resume" in line


def test_over_a_server_the_run_is_the_same(calm: Path, truth: dict[str, Any]) -> None:
    assert len(truth["bytes"]) == CLIENTS + ROUNDS * 2 * CLIENTS
    assert outcome(calm) == truth


# -- a server that dies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "at", "when"),
    [
        ("StageHost.backward", PASSES * CLIENTS + 4, "inside"),
        ("StageHost.optimizer_step", STEPS * CLIENTS + 2, "after"),
        ("StageHost.set_adapter", CLIENTS + 8 * CLIENTS + 2, "after"),  # at admission, then each layer of 6, mixed
    ],
)
def test_a_server_killed_in_the_middle_of_a_call(
    site: Site, truth: dict[str, Any], method: str, at: int, when: str
) -> None:
    marker = site.marker()
    server = site.serve(fault("stall", method, at, when, marker))
    client = site.train(IMPATIENT)
    client.until(marker.exists)
    server.kill()
    lost(client, site.port)
    assert [path.name for path in (site.run / "checkpoints").iterdir()] == ["000001"]  # the second round was under way
    site.serve()
    site.resume()
    assert outcome(site.run) == truth


def test_a_server_killed_while_it_generates(site: Site, truth: dict[str, Any]) -> None:
    server = site.serve(fault("die", "StageHost.decode", 2, "after"))
    client = site.train(IMPATIENT)
    lost(client, site.port)
    assert server.wait() == -signal.SIGKILL
    assert not (site.run / "metrics.json").exists()
    site.serve()
    well(site.start("evaluate", str(site.run), *site.there()))
    assert outcome(site.run) == truth
    site.resume()
    assert outcome(site.run) == truth


def test_a_server_that_hangs(site: Site, truth: dict[str, Any]) -> None:
    marker = site.marker()
    server = site.serve(fault("stall", "StageHost.forward", 4, "before", marker))
    client = site.train({"do": "patience", "patience_s": 0.5, "timeout_s": 2.0})
    client.until(marker.exists)
    server.send(signal.SIGSTOP)
    lost(client, site.port)
    server.kill()
    site.serve()
    site.resume()
    assert outcome(site.run) == truth


def test_a_server_started_anew_between_two_rounds(site: Site, truth: dict[str, Any]) -> None:
    marker = site.marker()
    server = site.serve()
    client = site.train(fault("stall", "CheckpointStore.write", 1, "after", marker))
    client.until(marker.exists)
    server.kill()
    site.serve()
    marker.unlink()
    lost(client, site.port, "does not know this session any more")
    site.resume()
    assert outcome(site.run) == truth


def test_evaluate_and_recommend_without_a_server(site: Site, calm: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    there = site.there(port)
    before = (calm / "metrics.json").read_bytes()
    asked = [
        site.start("evaluate", str(calm), *there, faults=(IMPATIENT,)),
        site.start("recommend", str(calm), "--client", "1", "--history", "Ash; Elm", *there, faults=(IMPATIENT,)),
    ]
    for command in asked:
        lost(command, port)
    assert (calm / "metrics.json").read_bytes() == before


# -- a client that dies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "at", "when"),
    [
        ("GrpcTransport.backward", PASSES * CLIENTS + 4, "before"),
        ("GrpcTransport.optimizer_step", STEPS * CLIENTS + 2, "before"),
        ("GrpcTransport.optimizer_step", STEPS * CLIENTS + 2, "after"),
    ],
)
def test_a_client_killed_in_the_middle_of_a_step(
    site: Site, truth: dict[str, Any], method: str, at: int, when: str
) -> None:
    marker = site.marker()
    site.serve()
    client = site.train(fault("stall", method, at, when, marker))
    client.until(marker.exists)
    client.kill()
    site.resume()
    assert outcome(site.run) == truth


# -- a network that fails ---------------------------------------------------------------------------------------


@pytest.fixture
def network(site: Site) -> Iterator[Callable[..., Any]]:
    made = []

    def start(*cuts: tuple[str, int]) -> Any:
        made.append(Proxy(site.port, cuts))
        return made[-1]

    yield start
    for own in made:
        own.close()


def test_connections_cut_at_drawn_moments(site: Site, network: Callable[..., Any], truth: dict[str, Any]) -> None:
    steps, passes = site.marker(), site.marker()
    site.serve(
        fault("count", "StageHost.optimizer_step", file=steps), fault("count", "StageHost.backward", file=passes)
    )
    drawn = random.Random(2)
    cuts = [(drawn.choice(("up", "down")), drawn.randrange(3_000, 120_000)) for _ in range(6)]
    cuts[2:2] = [("up", 300), ("down", 300), ("refuse", 2)]  # while the connection is being made again
    proxy = network(*cuts)
    client = site.train(port=proxy.port)
    well(client)
    assert (proxy.planned, proxy.cut_count) == (0, 10)
    assert proxy.connections > 8
    assert steps.stat().st_size == ROUNDS * CLIENTS * STEPS
    assert passes.stat().st_size == ROUNDS * CLIENTS * PASSES
    assert outcome(site.run) == truth


def test_replies_that_are_lost_after_the_request_was_carried_out(
    site: Site, network: Callable[..., Any], truth: dict[str, Any]
) -> None:
    calls = {
        "StageHost.admit": CLIENTS,
        "StageHost.forward": 5,
        "StageHost.backward": 5,
        "StageHost.gradient_norm_squared": 4,
        "StageHost.optimizer_step": 4,
        "StageHost.end_round": 3,
        "StageHost.adapter": 2,
        "StageHost.set_adapter": CLIENTS + 2,
        "StageHost.optimizer_state": 2,
        "StageHost.begin_round": CLIENTS + 2,
        "StageHost.open_cache": 1,
        "StageHost.decode": 2,
    }
    markers = [site.marker() for _ in calls]
    stalls = [fault("stall", name, at, "after", own) for (name, at), own in zip(calls.items(), markers, strict=True)]
    steps = site.marker()
    site.serve(*stalls, fault("count", "StageHost.optimizer_step", file=steps))
    proxy = network()
    client = site.train(IMPATIENT, port=proxy.port)
    for number in range(len(markers)):
        (marker,) = client.until(lambda: [own for own in markers if own.exists()])
        if number == 0:
            time.sleep(1.2)  # a reply may take longer than the patience with a server that does not answer
        proxy.cut()
        marker.unlink()
    well(client)
    assert proxy.cut_count == len(calls)
    assert steps.stat().st_size == ROUNDS * CLIENTS * STEPS
    assert outcome(site.run) == truth


def test_requests_that_are_delivered_twice_and_late(site: Site, truth: dict[str, Any]) -> None:
    steps = site.marker()
    site.serve(fault("count", "StageHost.optimizer_step", file=steps))
    well(site.train({"do": "repeat"}))
    assert steps.stat().st_size == ROUNDS * CLIENTS * STEPS
    assert outcome(site.run) == truth


# -- a server that is asked to stop -----------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [30.0, 0.1])
def test_a_server_that_is_asked_to_stop_during_a_round(site: Site, truth: dict[str, Any], grace: float) -> None:
    marker, ended, folder = site.marker(), site.marker(), site.marker()
    state = ("--state", str(folder), "--grace", str(grace))
    stall = fault("stall", "StageHost.backward", PASSES * CLIENTS + 3, "before", marker)
    server = site.serve(stall, fault("count", "StageHost.end_round", file=ended), options=state)
    client = site.train(IMPATIENT)
    client.until(marker.exists)
    server.send(signal.SIGTERM)
    server.until(lambda: "stopping: nothing new is begun" in server.out.read_text())
    time.sleep(0.3)  # longer than the short grace
    marker.unlink()
    assert server.wait() == 0, server.text()
    lost(client, site.port)
    said = "stopped" if grace > 1 else "stopped with rounds under way after 0.1 s"
    assert server.out.read_text().splitlines()[-1] == f"{said}; every adapter is in {folder}"
    assert len(list(folder.rglob("*.safetensors"))) >= CLIENTS
    assert ended.stat().st_size == CLIENTS + (grace > 1)  # the round under way was the first client's second
    site.serve(options=state)
    site.resume()
    assert outcome(site.run) == truth


# -- many faults ------------------------------------------------------------------------------------------------


def test_a_run_whose_server_and_client_are_killed_again_and_again(site: Site, truth: dict[str, Any]) -> None:
    host = " ".join(f"StageHost.{name}" for name in ("forward", "backward", "optimizer_step", "adapter", "set_adapter"))
    drawn, kills = random.Random(0), []
    server = None
    for attempt in range(12):
        at, when = drawn.randrange(20, 110), drawn.choice(("before", "after"))
        if attempt % 2:
            server = server or site.serve()
            client = site.train(fault("die", host.replace("StageHost", "GrpcTransport"), at, when), resume=True)
            code = client.wait()
            assert code in (0, -signal.SIGKILL), client.text()
        else:
            if server is not None:
                server.kill()
            server = site.serve(fault("die", host, at, when))
            client = site.train(IMPATIENT, resume=True)
            code = client.wait()
            if code:
                lost(client, site.port)
                assert server.wait() == -signal.SIGKILL
                server = None
        if code == 0:
            break
        kills.append(code)
    assert len(kills) >= 3
    assert outcome(site.run) == truth


# -- Ctrl-C -----------------------------------------------------------------------------------------------------


def interrupted(client: Command, seconds: float) -> None:
    """Press Ctrl-C, and check that a client ends within some seconds and says how to go on."""
    client.send(signal.SIGINT)
    assert client.wait(seconds) == 130, client.text()
    (line,) = client.err.read_text().splitlines()
    assert line.startswith("stopped. Go on with: pplr train trees.yaml"), line


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_around_a_request_leaves_nothing_on_the_server(site: Site, truth: dict[str, Any], when: str) -> None:
    """Whether the newest request was carried out or never sent, the client's tenancies are let go."""
    marker = site.marker()
    site.serve()
    client = site.train(fault("stall", "StageChannel.call", 2 * CLIENTS + 6, when, marker))
    client.until(marker.exists)
    interrupted(client, 20)
    listed = site.start("stage", "list", *site.there(kit="operator"))
    well(listed)
    assert listed.out.read_text().strip() == "The server holds no adapter."
    site.resume()
    assert outcome(site.run) == truth


@pytest.mark.parametrize("what", ["computes", "is gone"])
def test_ctrl_c_while_the_server(site: Site, truth: dict[str, Any], what: str) -> None:
    marker = site.marker()
    server = site.serve(fault("stall", "StageHost.forward", 4, "before", marker))
    client = site.train()
    client.until(marker.exists)
    if what == "is gone":
        server.kill()
        time.sleep(0.3)  # so that the client has begun to try again
    interrupted(client, 20)
    if what == "is gone":
        site.serve()
    marker.unlink()
    site.resume()
    assert outcome(site.run) == truth
