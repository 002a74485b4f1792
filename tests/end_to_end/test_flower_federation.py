"""A federation through Flower on loopback: the link, three nodes and the operator as real processes, with TLS and keys.

Every client has a folder with its own users' data and nobody else's; what comes of it is what one process gives that
has all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pplr.runtimes import in_process
from pplr.runtimes.run import open_run
from pplr.testing import same_state
from tests.end_to_end.machines import LIMIT_S, Place, records
from tests.runtimes.trackers.reading import check_trackers

pytest.importorskip("flwr")
TITLES = ("Titanic", "Fargo")


def test_three_machines_give_the_run_of_one_process(machines: Place, tmp_path: Path) -> None:
    from pplr.backbones.adapters import load_adapter

    here = in_process.train(machines.config, tmp_path / "here")
    machines.start_server()
    for name in machines.names:
        machines.start_client(name)
    done = machines.train(tmp_path / "there", "--set", "run.trackers=[tensorboard, mlflow]")
    assert done.code == 0, done.text() + "".join(map(machines.log, machines.processes))
    assert records(tmp_path / "there") == records(here.folder)
    check_trackers(open_run(tmp_path / "there"))
    metrics = json.loads((tmp_path / "there" / "metrics.json").read_text())
    assert metrics["clients"] == here.metrics["clients"]
    assert metrics["overall"] == pytest.approx(here.metrics["overall"], abs=1e-12)
    for name in machines.names:
        (adapter,) = (tmp_path / f"client-{name}" / "runs").glob(f"*/clients/{name}")
        assert same_state(load_adapter(adapter), load_adapter(here.folder / "clients" / name))


def test_the_middle_blocks_stay_on_the_stage_server(real_machines: Place, tmp_path: Path) -> None:
    """Real data, three clients with different cuts that hold bundles of their own blocks: the run of one process."""
    machines = real_machines
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
    told = machines.config.model_dump() | {"cut": cut}
    config = type(machines.config).model_validate(told | {"backbone": told["backbone"] | {"model": str(model)}})
    machines.config_file.write_text(config.to_yaml())
    here = in_process.train(config, tmp_path / "here")
    address = f"127.0.0.1:{machines.stage_port}"
    stage = ("--stage", str(bundles / "11" / "server"), "--stage-listen", address)
    machines.start_server(*stage, "--", "--dtype", "float32")
    at_stage = ("--stage-server", address)
    for name, (k, m) in cuts.items():
        folder = bundles / f"{k}{m}" / "client"
        machines.start_client(name, *at_stage, "--set", f"backbone.model={folder}")
    done = machines.train(tmp_path / "there", "--kit", str(tmp_path / "kits" / "olga"), *at_stage)
    assert done.code == 0, done.text() + "".join(map(machines.log, machines.processes))
    assert records(tmp_path / "there") == records(here.folder)
    for name in machines.names:
        (adapter,) = (tmp_path / f"client-{name}" / "runs").glob(f"*/clients/{name}")
        assert same_state(load_adapter(adapter), load_adapter(here.folder / "clients" / name))
    (own,) = (tmp_path / "client-1" / "runs").glob("*")
    for ask in (("evaluate",), ("recommend", "--history", "; ".join(TITLES))):
        verb, *more = ask
        machines.start(verb, verb, str(own), *more, "--kit", str(tmp_path / "kits" / "1"), *at_stage)
        assert machines.processes.pop(verb).wait(LIMIT_S) == 0, machines.log(verb)
    assert json.loads((own / "metrics.json").read_text())["clients"]["1"] == here.metrics["clients"]["1"]
    best = here.recommend("1", history=TITLES)[0]
    first = next(line for line in machines.log("recommend").splitlines() if line.strip().startswith("1 "))
    assert first.split()[-1] == best.item_id


def test_the_simulation_engine_gives_the_same_on_real_data(real_machines: Place, tmp_path: Path) -> None:
    from pplr.backbones.adapters import load_adapter

    here = in_process.train(real_machines.config, tmp_path / "here")
    run = ("--run-dir", str(tmp_path / "there"), "--set", "runtime.name=flower_simulation")
    run += ("--set", "runtime.deadline_s=150")  # for a machine with much else to do
    real_machines.start("simulation", "train", str(real_machines.config_file), *run)
    assert real_machines.processes.pop("simulation").wait(LIMIT_S) == 0, real_machines.log("simulation")
    assert records(tmp_path / "there") == records(here.folder)
    for name in real_machines.names:
        one, other = (load_adapter(folder / "clients" / name) for folder in (here.folder, tmp_path / "there"))
        assert same_state(one, other)
    assert json.loads((tmp_path / "there" / "metrics.json").read_text())["clients"] == here.metrics["clients"]
