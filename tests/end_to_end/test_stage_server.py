"""The cut between processes: a server, and clients that hold only their own layers, over mutual TLS on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import pplr
from pplr.backbones.adapters import natural_order
from pplr.backbones.bundles import write_bundles
from pplr.config import Config
from pplr.federation.aggregation import mix
from pplr.federation.methods import make_method
from pplr.federation.methods.base import RoundView
from pplr.progress import Silent
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.identity import enroll_client, init_federation, read_kit
from pplr.runtimes.in_process import train
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_operator import StageOperator
from pplr.storage import write_atomic
from pplr.testing import same_state, tiny_decoder, tiny_tokenizer
from tests.end_to_end.commands import Command, Driver

pytestmark = pytest.mark.slow

LAYERS = 5
CUTS = {"0": (1, 1), "1": (2, 1), "2": (1, 2)}
ROUNDS = 2
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its bundles each in a folder of its own, a federation and kits."""
    folder = tmp_path_factory.mktemp("three")
    tiny_decoder(layers=LAYERS, width=16).save_pretrained(folder / "whole")
    tiny_tokenizer().save_pretrained(folder / "whole")
    for name, (k, m) in (CUTS | {"all": (2, 2), "server": (1, 1)}).items():
        write_bundles(folder / "whole", folder / "cut", input_layers=k, output_layers=m)
        shutil.move(folder / "cut" / ("server" if name == "server" else "client"), folder / f"bundle-{name}")
        shutil.rmtree(folder / "cut")  # neither side needs what the other holds
    init_federation(folder / "ca", "trees", ["localhost"], address="localhost:1")
    for name in CUTS:
        enroll_client(folder / "ca", name, folder / "kits" / name)
    enroll_client(folder / "ca", "olga", folder / "operator", role="operator")
    return folder


@pytest.fixture(scope="module")
def config(small_config: Callable[..., Config], place: Path) -> Config:
    """Three clients of three cuts, by the whole model."""
    by_client = {name: {"input_layers": k, "output_layers": m} for name, (k, m) in CUTS.items() if name != "0"}
    return small_config(
        f"backbone.model={place / 'whole'}",
        "backbone.prompt.instruction=Name the next.",
        "backbone.max_tokens=256",
        f"federation.rounds={ROUNDS}",
        f"cut.by_client={json.dumps(by_client)}",
        "run.keep_rounds=true",
    )


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    return os.environ | {
        "PPLR_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(pplr.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }


@pytest.fixture(scope="module")
def driver(place: Path, environment: dict[str, str]) -> Iterator[Driver]:
    made = Driver(place, environment)
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(place: Path, environment: dict[str, str]) -> Iterator[str]:
    """Where the stage server, a process of its own, listens."""
    command = [sys.executable, "-m", "pplr.apps.cli", "stage", "serve", str(place / "bundle-server")]
    command += ["--federation", str(place / "ca"), "--listen", "localhost:0", "--dtype", "float32", "--threads", "1"]
    command += ["--state", str(place / "state"), "--metrics", "127.0.0.1:0"]
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        told = wait_for(lambda: [x for x in (place / "server.log").read_text().splitlines() if " on localhost:" in x])
        yield "localhost:" + told[0].split(" on localhost:")[1].split(",")[0]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert (place / "server.log").read_text().splitlines()[-1].startswith("stopped; every adapter is in")
    finally:
        server.kill()
        server.wait()


def wait_for(found: Callable[[], Any], processes: list[Command] | None = None) -> Any:
    """Wait until something is there, and fail as soon as a process that should bring it has failed."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if result := found():
            return result
        for process in processes or ():
            assert process.poll() in (None, 0), process.text()
        time.sleep(0.02)
    raise AssertionError("waited in vain")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """The run folder of the same federation in one process, with the whole model."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(config, folder)
    return folder


def test_three_client_processes_of_three_cuts_end_as_in_one_process(
    tmp_path: Path, place: Path, config: Config, driver: Driver, address: str, reference: Path
) -> None:
    clients = []
    for name, (k, m) in CUTS.items():
        own = config.model_copy(
            update={
                "backbone": config.backbone.model_copy(update={"model": str(place / f"bundle-{name}")}),
                "cut": type(config.cut)(input_layers=k, output_layers=m),
            }
        )
        (tmp_path / f"{name}.yaml").write_text(own.to_yaml())
        arguments = (str(tmp_path / f"{name}.yaml"), name, str(place / "kits" / name), address, str(tmp_path))
        clients.append(driver.start(*arguments, program=Path(__file__).with_name("one_client.py")))
    try:
        channel = StageChannel(address, read_kit(place / "operator"))
        operator = StageOperator(channel)
        method = make_method(config.federation)
        initial = Assembly(config, Silent()).initial
        for server_round in range(ROUNDS):
            told, adapters = {}, {}
            for name in CUTS:
                wait_for((tmp_path / f"{name}-{server_round}.json").exists, clients)
                told[name] = json.loads((tmp_path / f"{name}-{server_round}.json").read_text())
                own = load_file(tmp_path / f"{name}-{server_round}-local.safetensors")
                hosted = operator.adapter(name, name)
                assert not own.keys() & hosted.keys()
                adapters[name] = {key: (own | hosted)[key] for key in natural_order(own | hosted)}
                kept = load_file(reference / "rounds" / str(server_round + 1) / name / "local.safetensors")
                assert same_state(adapters[name], kept), f"client {name} in server round {server_round + 1}"
            mixing = method.mixing(
                RoundView(
                    server_round,
                    list(adapters.values()),
                    initial,
                    [own["loss"] for own in told.values()],
                    [own["samples"] for own in told.values()],
                )
            )
            assert mixing.weights is not None
            mixed: dict[str, dict[str, torch.Tensor]] = {name: {} for name in CUTS}
            for layer in mix(list(adapters.values()), mixing.weights, averaging=config.federation.averaging):
                for name, tensors in zip(CUTS, layer, strict=True):
                    mixed[name] |= {key: tensor.clone() for key, tensor in tensors.items()}
            for name, state in mixed.items():
                kept = load_file(reference / "rounds" / str(server_round + 1) / name / "mixed.safetensors")
                assert same_state({key: state[key] for key in natural_order(state)}, kept)
                hosted_names = operator.adapter(name, name).keys()
                operator.set_adapter(name, name, {key: state[key] for key in hosted_names})
                own = {key: tensor for key, tensor in state.items() if key not in hosted_names}
                write_atomic(tmp_path / f"{name}-{server_round}-mixed.safetensors", save(own))
        for name, client in zip(CUTS, clients, strict=True):
            assert client.wait(PATIENCE_S) == 0, f"client {name}: {client.text()}"
    finally:
        for client in clients:
            client.kill()

    torch.set_num_threads(1)
    assembly = Assembly(config, Silent())
    for name, (k, m) in CUTS.items():
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told["blocks"] == [*range(k), *range(LAYERS - m, LAYERS)]
        assert {int(key.split(".layers.")[1].split(".")[0]) for key in told["middle"]} == set(range(k, LAYERS - m))
        last = load_file(reference / "rounds" / str(ROUNDS) / name / "mixed.safetensors")
        expected = assembly.ranker(assembly.admit(name, last)).scores(assembly.data.test[name][:1])[0]
        assert told["scores"] == expected.tolist()
    assert operator.hosted() == []
    channel.close()


def test_one_command_trains_evaluates_and_recommends_through_the_server_as_in_one_process(
    tmp_path: Path, place: Path, config: Config, driver: Driver, address: str, reference: Path
) -> None:
    bundle = config.backbone.model_copy(update={"model": str(place / "bundle-all")})
    (tmp_path / "trees.yaml").write_text(config.model_copy(update={"backbone": bundle}).to_yaml())
    server = ["--stage-server", address, "--kit", str(place / "kits")]

    def pplr_command(*arguments: str) -> Command:
        done = driver.start(*arguments, folder=tmp_path)
        done.wait(PATIENCE_S)
        return done

    done = pplr_command("train", "trees.yaml", "--run-dir", "run", *server)
    assert done.code == 0, done.text()
    for name in CUTS:
        ours, theirs = (
            folder / "clients" / name / "adapter_model.safetensors" for folder in (tmp_path / "run", reference)
        )
        assert same_state(load_file(ours), load_file(theirs)), name
    metrics, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "run", reference))
    for part in ("overall", "clients", "spread", "floors", "cut"):
        assert metrics[part] == expected[part]
    assert metrics["cost"]["wire"] == expected["cost"]["wire"]
    assert metrics["cost"]["client"]["peak_rss_bytes"] > 0
    flops = expected["cost"]["server"]["train_flops"]  # worked out, so that it does not matter who hosts the blocks
    assert metrics["cost"]["server"] == {"stored_bytes": None, "peak_rss_bytes": None, "train_flops": flops}
    assert flops > 0

    asked = ("recommend", "run", "--client", "1", "--history", "Ash; Elm")
    remote = pplr_command(*asked, *server)
    assert remote.code == 0, remote.text()
    found = pplr.open_run(reference).recommend(client="1", history=["Ash", "Elm"])
    rows = [line.split() for line in remote.out.read_text().splitlines() if line.split() and line.split()[0].isdigit()]
    assert [row[-1] for row in rows] == [own.item_id for own in found]

    without = pplr_command(*asked)
    assert without.code == 1
    assert "does not hold block" in without.err.read_text()
    assert "--stage-server" in without.err.read_text()

    listed = pplr_command("stage", "list", "--stage-server", address, "--kit", str(place / "operator"))
    assert listed.out.read_text().strip() == "The server holds no adapter."
    text = pplr_command("stage", "metrics", "--stage-server", address, "--kit", str(place / "operator")).out.read_text()
    assert 'pplr_stage_requests_total{client="1",code="OK",method="OptimizerStep"}' in text
    assert "process_resident_memory_bytes" in text
    health = pplr_command("stage", "health", "--stage-server", address, "--kit", str(place / "kits" / "0"))
    assert (health.code, health.out.read_text().strip()) == (0, f"{address} is serving")
