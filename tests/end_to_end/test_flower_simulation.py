"""Flower's Ray engine on this machine: the same run as in one process, and nothing but loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from pplr.runtimes import in_process
from pplr.runtimes.run import open_run
from pplr.testing import same_adapters
from tests.docs.pages import DOCS, blocks, commands
from tests.runtimes.trackers.reading import check_trackers

pytest.importorskip("ray")
SETTINGS = ("federation.rounds=3", "federation.participation=0.7")
PAGE = DOCS / "runtimes.md"
((_, TRAIN, _, *SIMULATED),) = next(found for found in map(commands, blocks(PAGE)) if len(found) == 1)
"""The page's command, whose configuration is replaced by a tiny one."""
LIMIT_S = 300


@pytest.fixture
def config(small_config, model_folder: Path) -> Callable[..., Any]:
    return lambda *settings: small_config(f"backbone.model={model_folder}", *settings)


@pytest.fixture
def command(config, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a simulated run, in a process of its own, as a user starts it."""

    def make(folder: Path, settings: Sequence[str], *more: str) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(config(*settings, "runtime.deadline_s=300").to_yaml())
        return [sys.executable, "-m", "pplr.apps.cli", TRAIN, str(path), *SIMULATED, "--run-dir", str(folder), *more]

    return make


def comparable(folder: Path) -> tuple[object, object]:
    """Everything of a run but how long it took and what it ran on."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in rounds:
        for own in record["clients"].values():
            own.pop("seconds", None)
    metrics = json.loads((folder / "metrics.json").read_text())
    return rounds, {key: own for key, own in metrics.items() if key not in ("seconds", "samples_per_second")}


def watched(process: psutil.Process) -> tuple[set[str], set[str]]:
    """The addresses that a process and all that it started are connected to, and the programs that these run."""
    addresses, programs = set(), set()
    for own in [process, *process.children(recursive=True)]:
        try:
            programs |= {Path(word).name for word in own.cmdline()[:4]}
            for connection in own.net_connections(kind="inet"):
                addresses |= {address.ip for address in (connection.raddr,) if address}
        except psutil.Error:
            continue  # it has ended meanwhile
    return addresses, programs


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")


def test_a_simulation_gives_the_in_process_run_tells_its_trackers_and_reaches_nobody(
    command, config, tmp_path: Path
) -> None:
    here = in_process.train(config(*SETTINGS), tmp_path / "here")
    folder = tmp_path / "there"
    tracked = command(folder, (*SETTINGS, "run.trackers=[tensorboard, mlflow]"))
    process = subprocess.Popen(tracked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen: set[str] = set()
    ran: set[str] = set()
    until = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < until:
        addresses, programs = watched(psutil.Process(process.pid))
        seen, ran = seen | addresses, ran | programs
        time.sleep(0.2)
    output = process.communicate(timeout=10)[0]
    assert process.returncode == 0, output
    assert comparable(folder) == comparable(here.folder)
    assert same_adapters(folder, here.folder)
    check_trackers(open_run(folder))
    assert seen, "no connection was seen, so nothing was watched"
    assert all(is_loopback(address) for address in seen), seen
    assert "raylet" in ran, "the engine's processes were not seen"
    assert "dashboard.py" not in ran  # it asks a cloud's metadata service too quickly to be seen each time


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool], log: Path) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def test_a_simulation_that_is_killed_between_and_within_rounds_ends_as_if_it_never_was(
    command, config, tmp_path: Path
) -> None:
    here = in_process.train(config(*SETTINGS), tmp_path / "here")
    folder = tmp_path / "there"
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command(folder, SETTINGS), stdout=out, stderr=out)
    # 000002 is the state after a client's first round; 000003 after its training in the second, which nobody has mixed
    trained = folder / "checkpoints" / "clients"
    wait_for(process, lambda: any(trained.glob("*/000003")), log)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=60)  # the engine ends by itself once its driver is gone
    assert not (folder / "checkpoints" / "000002").exists()
    again = subprocess.run(command(folder, SETTINGS, "--resume"), capture_output=True, text=True, timeout=LIMIT_S)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on after server round 1 of 3" in again.stdout + again.stderr
    assert comparable(folder) == comparable(here.folder)
    assert same_adapters(folder, here.folder)
