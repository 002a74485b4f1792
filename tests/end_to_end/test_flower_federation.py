"""A federation through Flower on loopback: the link, three nodes and the operator as real processes, with TLS and keys.

Every client has a folder with its own users' data and nobody else's; what comes of it is what one process gives that
has all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pplr.runtimes import in_process
from pplr.runtimes.assembly import load_run_data
from pplr.runtimes.identity import enroll_client, init_federation, revoke
from pplr.testing import same_state

pytest.importorskip("flwr")
LIMIT_S = 180
HOSTILE = Path(__file__).parent / "hostile_client.py"
SETTINGS = (
    "data.catalog=all",
    "training.samples=null",
    "evaluation.test_users=null",
    "evaluation.validation_users=3",
    "runtime.deadline_s=60",
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Place:
    """A federation's folders and processes below one folder."""

    def __init__(self, root: Path, config, names: tuple[str, ...]) -> None:
        self.root, self.config, self.names = root, config, names
        self.port, self.stage_port = free_port(), free_port()
        self.federation, self.state = root / "federation", root / "state"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        init_federation(self.federation, "fed", ["127.0.0.1"], address="127.0.0.1:8443")
        self.config_file = root / "config.yaml"
        self.config_file.write_text(config.to_yaml())
        data = load_run_data(config)
        enroll_client(self.federation, "olga", root / "kits" / "olga", role="operator")
        for name, users in zip(data.partition.names, data.partition.users, strict=True):
            enroll_client(self.federation, name, root / "kits" / name)
            self._split(name, {data.dataset.user_ids[user] for user in users})

    def _split(self, name: str, kept: set[str]) -> None:
        whole, folder = self.config.data.path, self.root / "data" / name
        folder.mkdir(parents=True)
        shutil.copy(whole / "tiny.item", folder)
        for part in ("tiny.user", "tiny.inter"):
            header, *lines = (whole / part).read_text().splitlines(keepends=True)
            (folder / part).write_text(header + "".join(line for line in lines if line.split("\t")[0] in kept))

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def start(self, name: str, *arguments: str) -> None:
        with (self.root / f"{name}.log").open("ab") as out:
            program = [str(HOSTILE)] if name == "hostile" else ["-m", "pplr.apps.cli"]
            command = [sys.executable, *program, *arguments]
            environment = os.environ | {"FLWR_HOME": str(self.root / "flwr" / name)}
            self.processes[name] = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    def start_server(self, *more: str) -> None:
        self.start("server", "server", "--federation", str(self.federation), "--state", str(self.state),
                   "--listen", f"127.0.0.1:{self.port}", *more)  # fmt: skip
        self.wait(lambda: self.listens() and self.log("server").count("may join") >= len(self.names), "server")

    def listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def start_client(self, name: str, *more: str, kit: str | None = None, label: str | None = None) -> None:
        label = label or f"client-{name}"
        self.start(label, "client", "--kit", str(self.root / "kits" / (kit or name)), "--data",
                   str(self.root / "data" / name), "--server", f"127.0.0.1:{self.port}", "--folder",
                   str(self.root / label), *more)  # fmt: skip

    def wait(self, condition: Callable[[], bool], of: str) -> None:
        until = time.monotonic() + LIMIT_S
        while not condition():
            assert self.processes[of].poll() is None, self.log(of)
            assert time.monotonic() < until, "it took too long:\n" + "\n".join(map(self.log, self.processes))
            time.sleep(0.1)

    def train(self, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pplr.apps.cli", "train", str(self.config_file), "--run-dir", str(run),
                   "--federation", str(self.federation), "--state", str(self.state), *more]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    def start_training(self, run: Path) -> None:
        self.start("training", "train", str(self.config_file), "--run-dir", str(run), "--federation",
                   str(self.federation), "--state", str(self.state))  # fmt: skip

    def kill(self, name: str) -> None:
        """Kill a process and what it started, at once."""
        own = psutil.Process(self.processes[name].pid)
        for process in [*own.children(recursive=True), own]:
            process.kill()
        self.processes.pop(name).wait()

    def stop(self) -> None:
        for process in reversed(list(self.processes.values())):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def place(tmp_path: Path, small_config, model_folder: Path) -> Iterator[Place]:
    config = small_config(f"backbone.model={model_folder}", *SETTINGS)
    made = Place(tmp_path, config, ("0", "1", "2"))
    yield made
    made.stop()


def records(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in found:
        for own in record["clients"].values():
            own.pop("seconds", None)
    return found


def test_three_machines_give_the_run_of_one_process(place: Place, tmp_path: Path) -> None:
    from pplr.backbones.adapters import load_adapter

    here = in_process.train(place.config, tmp_path / "here")
    place.start_server()
    for name in place.names:
        place.start_client(name)
    done = place.train(tmp_path / "there")
    assert done.returncode == 0, done.stdout + done.stderr + "".join(map(place.log, place.processes))
    assert records(tmp_path / "there") == records(here.folder)
    metrics = json.loads((tmp_path / "there" / "metrics.json").read_text())
    assert metrics["clients"] == here.metrics["clients"]
    assert metrics["overall"] == pytest.approx(here.metrics["overall"], abs=1e-12)
    for name in place.names:
        (adapter,) = (tmp_path / f"client-{name}" / "runs").glob(f"*/clients/{name}")
        assert same_state(load_adapter(adapter), load_adapter(here.folder / "clients" / name))


def test_the_middle_blocks_stay_on_the_stage_server(place: Place, tmp_path: Path) -> None:
    """Three clients with different cuts hold bundles of their own blocks alone; it gives the run of one process."""
    from pplr.backbones.adapters import load_adapter
    from pplr.backbones.bundles import write_bundles
    from pplr.testing import tiny_decoder, tiny_tokenizer

    cuts = {"0": (1, 1), "1": (2, 1), "2": (1, 2)}
    model, bundles = tmp_path / "model", tmp_path / "bundles"
    tiny_decoder(layers=5, width=16).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    for k, m in cuts.values():
        write_bundles(model, bundles / f"{k}{m}", input_layers=k, output_layers=m)
    cut = {"input_layers": 1, "output_layers": 1, "by_client": {
        name: {"input_layers": k, "output_layers": m} for name, (k, m) in cuts.items()}}  # fmt: skip
    told = place.config.model_dump() | {"cut": cut}
    config = type(place.config).model_validate(told | {"backbone": told["backbone"] | {"model": str(model)}})
    place.config_file.write_text(config.to_yaml())
    here = in_process.train(config, tmp_path / "here")
    place.start_server("--stage", str(bundles / "11" / "server"), "--stage-listen", f"127.0.0.1:{place.stage_port}",
                       "--", "--dtype", "float32")  # fmt: skip
    at_stage = ("--stage-server", f"127.0.0.1:{place.stage_port}")
    for name, (k, m) in cuts.items():
        folder = bundles / f"{k}{m}" / "client"
        place.start_client(name, *at_stage, "--set", f"backbone.model={folder}")
    done = place.train(tmp_path / "there", "--kit", str(tmp_path / "kits" / "olga"), *at_stage)
    assert done.returncode == 0, done.stdout + done.stderr + "".join(map(place.log, place.processes))
    assert records(tmp_path / "there") == records(here.folder)
    for name in place.names:
        (adapter,) = (tmp_path / f"client-{name}" / "runs").glob(f"*/clients/{name}")
        assert same_state(load_adapter(adapter), load_adapter(here.folder / "clients" / name))
    (own,) = (tmp_path / "client-1" / "runs").glob("*")
    for ask in (("evaluate",), ("recommend", "--history", "Ash; Elm")):
        verb, *more = ask
        place.start(verb, verb, str(own), *more, "--kit", str(tmp_path / "kits" / "1"), *at_stage)
        assert place.processes.pop(verb).wait(LIMIT_S) == 0, place.log(verb)
    assert json.loads((own / "metrics.json").read_text())["clients"]["1"] == here.metrics["clients"]["1"]
    best = here.recommend("1", history=["Ash", "Elm"])[0]
    assert next(line for line in place.log("recommend").splitlines() if line.strip().startswith("1 ")).split()[1] == (
        best.title
    )


def test_a_node_that_is_killed_is_left_out_and_comes_back_with_its_own_adapter(place: Place, tmp_path: Path) -> None:
    """The link takes it for alive for a minute after it was killed, and lets it in again then."""
    config = place.config
    federation = config.federation.model_copy(update={"rounds": 11, "patience": None})
    runtime = config.runtime.model_copy(update={"deadline_s": 8.0})
    place.config_file.write_text(config.model_copy(update={"federation": federation, "runtime": runtime}).to_yaml())
    place.start_server()
    for name in place.names:
        place.start_client(name)
    run, state = tmp_path / "there", tmp_path / "client-1" / "runs"
    place.start_training(run)
    place.wait(lambda: any(state.glob("*/state/000002")), "training")
    place.kill("client-1")
    place.wait(lambda: "goes on without client 1: it did not answer" in place.log("training"), "training")
    place.start_client("1")
    assert place.processes["training"].wait(LIMIT_S) == 0, place.log("training")
    took_part = [set(record["clients"]) for record in records(run)]
    assert took_part[0] == {"0", "1", "2"}
    assert {"0", "2"} in took_part
    assert took_part[-1] == {"0", "1", "2"}
    assert set(json.loads((run / "metrics.json").read_text())["clients"]) == {"0", "1", "2"}


def test_whoever_should_not_be_there_is_kept_out_and_the_others_go_on(place: Place, tmp_path: Path) -> None:
    """A client with a revoked kit, one with another's kit, and an enrolled one that sends NaN and huge updates."""
    enroll_client(place.federation, "3", place.root / "kits" / "3")
    revoke(place.federation, "3")
    place.start_server()
    for name in ("0", "1"):
        place.start_client(name)
    place.start_client("2", label="hostile")
    place.wait(lambda: "is connected" in place.log("client-0") and "is connected" in place.log("client-1"), "client-0")
    shutil.copytree(place.root / "data" / "2", place.root / "data" / "3")
    place.start_client("3")  # revoked
    place.start_client("2", kit="0", label="thief")  # the kit of a client that is there
    for name in ("client-3", "thief"):
        place.wait(lambda name=name: "does not let this client in" in place.log(name), name)
    done = place.train(tmp_path / "there")
    assert done.returncode == 0, done.stdout + done.stderr + "".join(map(place.log, place.processes))
    told = " ".join((done.stdout + done.stderr).split())  # as lines are broken anywhere
    assert "goes on without client 2: client 2's adapter: base_model" in told, told
    assert "holds NaN" in told, told
    assert "goes on without client 2: its update has norm" in told, told
    assert [set(record["clients"]) for record in records(tmp_path / "there")] == [{"0", "1"}, {"0", "1"}]
    for name in ("client-3", "thief"):
        assert "taking part" not in place.log(name)
    honest = in_process.train(place.config, tmp_path / "here")  # all three train there
    assert (
        honest.rounds[0]["clients"]["0"]["mixed_from"] != records(tmp_path / "there")[0]["clients"]["0"]["mixed_from"]
    )


def test_a_link_that_was_killed_is_started_again_and_the_run_goes_on(place: Place, tmp_path: Path) -> None:
    """Between two rounds, with all clients in place: they join again by themselves, and nothing of the run is lost."""
    federation = place.config.federation.model_copy(update={"rounds": 4, "patience": None})
    config = place.config.model_copy(update={"federation": federation})
    place.config_file.write_text(config.to_yaml())
    place.start_server()
    for name in place.names:
        place.start_client(name)
    run = tmp_path / "there"
    place.start_training(run)
    place.wait(lambda: (run / "rounds.jsonl").exists() and len(records(run)) >= 1, "training")
    place.kill("server")
    assert place.processes.pop("training").wait(LIMIT_S) == 1
    assert "does not answer" in place.log("training")
    place.start_server()
    done = place.train(run, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr + "".join(map(place.log, place.processes))
    assert "going on after server round" in done.stdout + done.stderr
    here = in_process.train(config, tmp_path / "here")
    assert records(run) == records(here.folder)


def test_the_operators_part_of_the_link_is_closed_to_clients(place: Place) -> None:
    """Who holds a kit and no secret can neither start a run, nor let a node in, nor take the server's tasks."""
    from pplr.runtimes.address import LinkAddress
    from pplr.runtimes.flower_federation import link_of
    from pplr.runtimes.flower_link import Operator, server_grid

    place.start_server()
    link = link_of(place.federation, place.state)
    guessed = LinkAddress(link.address, link.ca_pem, b"0" * 64)
    with contextlib.closing(Operator(link)) as operator:
        assert len(operator.nodes()) == len(place.names)  # the positive control
    refused = r"401|403|[Uu]nauth|[Aa]uthenticat"
    for ask in (Operator.nodes, Operator.start_run, lambda own: own.register(b"key"), lambda own: own.unregister(1)):
        with contextlib.closing(Operator(guessed)) as stranger, pytest.raises(Exception, match=refused):
            ask(stranger)
    with pytest.raises(Exception, match=refused), server_grid(guessed, 1):
        pass
