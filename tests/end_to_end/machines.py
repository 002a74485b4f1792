"""A federation of several machines on loopback, for tests: folders, the link, nodes and the operator as processes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from pplr.runtimes.identity import enroll_client, init_federation
from pplr.runtimes.run_data import load_run_data
from tests.end_to_end.commands import Command, Driver

LIMIT_S = 180
HOSTILE = Path(__file__).parent / "hostile_client.py"
SETTINGS = (
    "data.catalog=all",
    "training.samples=null",
    "evaluation.test_users=null",
    "evaluation.validation_users=3",
    "runtime.deadline_s=60",
)


def write_movielens(source: Path, folder: Path, users: int = 24) -> Path:
    """Write the ratings of the users of MovieLens-100K who gave fewest, and the films they rated, as ``tiny.*``."""
    parts = {
        end: (source / f"ml-100k.{end}").read_text().splitlines(keepends=True) for end in ("inter", "user", "item")
    }
    given = Counter(line.split("\t")[0] for line in parts["inter"][1:])
    kept = {user for user, _ in sorted(given.items(), key=lambda own: (own[1], own[0]))[:users]}
    rated = {line.split("\t")[1] for line in parts["inter"][1:] if line.split("\t")[0] in kept}
    folder.mkdir(parents=True)
    for end, (header, *lines) in parts.items():
        own = [line for line in lines if line.split("\t")[0] in (rated if end == "item" else kept)]
        (folder / f"tiny.{end}").write_text("".join([header, *own]))
    return folder


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Place:
    """A federation's folders and processes below one folder."""

    def __init__(self, root: Path, config, names: tuple[str, ...], driver: Driver) -> None:
        self.root, self.config, self.names, self._driver = root, config, names, driver
        self.port, self.stage_port = free_port(), free_port()
        self.federation, self.state = root / "federation", root / "state"
        self.processes: dict[str, Command] = {}
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

    def start(self, name: str, *arguments: str) -> Command:
        out = self.root / f"{name}.log"
        self.processes[name] = Command(
            self._driver,
            arguments,
            out,
            out,
            folder=self.root,
            environment={"FLWR_HOME": str(self.root / "flwr" / name)},
            program=HOSTILE if name == "hostile" else None,
        )
        return self.processes[name]

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

    def operators(self) -> list[str]:
        """What the operator needs, on a machine of its own: who is enrolled, and two files of the server's state."""
        federation, state = self.root / "operator" / "federation", self.root / "operator" / "state"
        shutil.copytree(self.federation, federation, ignore=shutil.ignore_patterns("*.key"), dirs_exist_ok=True)
        state.mkdir(exist_ok=True)
        for name in ("link.json", "link.secret"):
            shutil.copy(self.state / name, state)
        return ["--federation", str(federation), "--state", str(state)]

    def train(self, run: Path, *more: str) -> Command:
        """Train to the end, whatever it is."""
        training = self.start_training(run, *more)
        training.wait(LIMIT_S)
        return self.processes.pop("training")

    def start_training(self, run: Path, *more: str) -> Command:
        return self.start("training", "train", str(self.config_file), "--run-dir", str(run), *self.operators(), *more)

    def kill(self, name: str) -> None:
        """Kill a process and what it started, at once."""
        own = psutil.Process(self.processes[name].pid)
        for process in [*own.children(recursive=True), own]:
            process.kill()
        self.processes.pop(name).wait()

    def stop(self) -> None:
        left = [process for process in reversed(list(self.processes.values())) if process.poll() is None]
        for process in left:
            process.send(signal.SIGTERM)
        for process in left:
            if process.poll(20) is None:
                process.kill()


def records(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in found:
        for own in record["clients"].values():
            own.pop("seconds", None)
    return found
