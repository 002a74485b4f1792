"""The deployment page, run from top to bottom: every command on it, on one machine, with a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import pplr
from pplr.testing import tiny_decoder, tiny_tokenizer

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
TREES = ("Ash", "Birch", "Cedar", "Elm", "Fir", "Oak", "Pine", "Yew")
LIMIT_S = 180


def write_data(folder: Path) -> None:
    """Write the catalog that both clients have, and a history for each."""
    items = [f"s{number},{title}" for number, title in enumerate(TREES)]
    (folder / "items.csv").write_text("\n".join(["sku,title", *items, ""]))
    for name, step in (("north", 1), ("south", 3)):
        rows = [
            f"c{customer},s{(customer + step * place) % len(TREES)},{place}"
            for customer in range(12)
            for place in range(5)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["customer,sku,day", *rows, ""]))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Walk:
    """Carries out a page's commands in a folder; servers and clients run on, each with a log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PPLR_CACHE": str(folder / "cache"),
            "FLWR_HOME": str(folder / "flwr"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(pplr.__file__).parents[1]),
            "HF_HUB_OFFLINE": "1",
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(self, name: str, words: list[str], ready: Callable[[str], bool]) -> None:
        """Start what runs on, and wait until its log says that it is there."""
        with (self.folder / f"{name}.log").open("w") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "pplr.apps.cli", *words],
                cwd=self.folder, env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + LIMIT_S
        while not ready(self.log(name)):
            assert self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < until, self.log(name)
            time.sleep(0.1)

    def carry_out(self, words: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pplr.apps.cli", *words],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        logs = "".join(map(self.log, self.running))
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}{logs}"

    def stop(self) -> None:
        for process in reversed(list(self.running.values())):
            process.kill()
            process.wait()


def test_the_page_leads_from_nothing_to_a_federation_of_three_machines(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    tiny_decoder(layers=8, width=16).save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    write_data(tmp_path)
    (told,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    config = yaml.safe_load(told)
    config["evaluation"] |= {"test_users": 3, "validation_users": 2, "beams": 2, "max_new_tokens": 4, "cutoffs": [5]}
    config["federation"]["rounds"] = 1
    (tmp_path / "shops.yaml").write_text(yaml.safe_dump(config))
    link, stage = free_port(), free_port()
    here = {"fed.example.org:8443": f"localhost:{stage}", "fed.example.org:8000": f"localhost:{link}"}
    here |= {"fed.example.org": "localhost", "0.0.0.0:8000": f"127.0.0.1:{link}", "0.0.0.0:8443": f"localhost:{stage}"}
    here |= {"127.0.0.1:9464": "127.0.0.1:0", "smollm2-135m": "whole"}
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(commands) >= 17
    walk, done = Walk(tmp_path), 0
    try:
        for command in commands:
            line = command
            for there, mine in here.items():
                line = line.replace(there, mine)
            if "RUN" in line:
                (run,) = (tmp_path / shlex.split(line)[2]).parent.glob("*")
                line = line.replace("RUN", run.name)
            program, *words = shlex.split(line)
            assert program == "pplr", command
            done += 1
            if words[0] == "server":
                walk.start("server", words, lambda log: f"on localhost:{stage}" in log and log.count("may join") == 2)
            elif words[0] == "client":
                name = words[words.index("--folder") + 1]
                walk.start(name, words, lambda log: "is connected to" in log)
            elif "--resume" in words:
                continue  # the run before it was not stopped
            else:
                walk.carry_out(words)
        for name in ("north", "south", "server"):
            walk.running[name].send_signal(signal.SIGTERM)
        for name in ("north", "south", "server"):
            assert walk.running[name].wait(60) == 0, walk.log(name)
    finally:
        walk.stop()
    assert done == len(commands)
    metrics = json.loads((tmp_path / "runs" / "shops" / "metrics.json").read_text())
    assert set(metrics["clients"]) == {"north", "south"}
    assert "every adapter is in" in walk.log("server")  # the stage server ended in order, with the link
