"""The examples run, with a model and data that are small enough for seconds."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from pplr.runtimes.run import open_run

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
TINY = (
    "backbone.dtype=float32",
    "backbone.keep_blocks=null",
    "training.local_epochs=1",
    "federation.clients=3",
    "federation.rounds=1",
    "evaluation.test_users=6",
    "evaluation.validation_users=2",
    "runtime.threads=1",
)


@pytest.fixture
def example(tmp_path, monkeypatch, capsys, data_folder, model_folder):
    """Run an example as its own program, in an empty folder, and return the lines that it printed."""
    data = ("data.source=recbole", f"data.path={data_folder}", "data.partition={by: column, column: region}")

    def run(name, *arguments, own_data=False):
        settings = (*TINY, f"backbone.model={model_folder}", *(() if own_data else data))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments, *settings])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_is_listed(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    assert f"({path.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def test_methods_are_held_against_each_client_alone(example):
    lines = example("federation")
    tested = {name: open_run(f"runs/examples/{name}").evaluation().overall() for name in ("local", "fedavg", "pplr")}
    for name, overall in tested.items():
        (place,) = (place for place, line in enumerate(lines) if line.startswith(f"{name}: 1 rounds"))
        assert f"ndcg@10 overall {overall['ndcg@10']:.4f}" in lines[place + 1]
    for name, line in zip(("fedavg", "pplr"), lines[-2:], strict=True):
        difference = tested[name]["ndcg@10"] - tested["local"]["ndcg@10"]
        assert line.startswith(f"runs/examples/{name} less local: {difference:+.4f}, 95 % between ")
        assert "6 users: " in line
    assert example("federation")[-2:] == lines[-2:]  # once more: nothing is trained anew


def test_own_orders_become_recommendations_to_somebody_new(example, tmp_path):
    lines = example("own_data", own_data=True)
    assert lines[:3] == [f"client {n}, shop: shop {n}: 40 customers" for n in range(3)]
    up, down = (int(own.replace(",", "")) for own in re.findall(r"[\d,]+(?= bytes up| down)", lines[3]))
    run = open_run(tmp_path / "runs/examples/orders")
    assert {"bytes_up": up, "bytes_down": down} == run.metrics["cost"]["wire"]
    assert up > 0
    history = run.assembly().data.dataset.catalog.titles[:2]
    for client, line in zip("012", lines[4:], strict=True):
        best = [found.title for found in run.recommend(client, history=history, count=3)]
        assert line == f"after {' and '.join(history)}, client {client} recommends: {best}"
    again = example("own_data", "orders.csv", own_data=True)
    assert again == lines


def test_leakage_stands_beside_quality(example):
    lines = example("leakage")
    run = open_run("runs/examples/audited")
    told = json.loads((run.folder / "audit.json").read_text())
    heading = next(place for place, line in enumerate(lines) if line.startswith(" k  m  noise"))
    rows = [line.split() for line in lines[heading + 1 : -1]]
    assert [row[:3] for row in rows] == [["0", "0", "0"], ["0", "0", "1"], ["1", "0", "0"], ["1", "0", "1"]]
    for row, found in zip(rows, told["settings"], strict=True):
        assert row[3] == f"{found['worth']['mean']:.4f}"
        assert row[4] == f"{max(own['item_f1']['mean'] for own in found['audits'] if own.get('item_f1')):.2f}"
    assert lines[-1] == told["verdict"]
    assert example("leakage", "runs/examples/audited")[-5:] == lines[-5:]
