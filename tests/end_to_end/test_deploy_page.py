"""The deployment page, run from top to bottom: every command on it, on one machine, with a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.end_to_end.machines import free_port
from tests.end_to_end.walk import PAGE, Walk, write_federation

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow


def test_the_page_leads_from_nothing_to_a_federation_of_three_machines(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8").partition("## With containers")[0]
    write_federation(tmp_path, tmp_path / "whole")
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
