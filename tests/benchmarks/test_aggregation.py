"""The measurement of aggregation on tiny adapters: the plain loops say what pplr says, and their time is scaled."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import aggregation
from benchmarks.reference.plain_loops import mixed_by_loops
from pplr.config import FederationConfig
from pplr.federation.aggregation import mix
from pplr.federation.methods import make_method


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 2, "LAYERS": 2, "WIDTH": 6, "VALUES": 4}.items():
        monkeypatch.setattr(aggregation, name, value)


def test_plain_loops_mix_as_the_method_does() -> None:
    states = [aggregation.draw(client) for client in range(6)]
    view = aggregation.view_of(states, 6)
    weights = make_method(FederationConfig(clients=6)).mixing(view).weights
    found: list[dict] = [{} for _ in states]
    for block in mix(states, weights):
        for own, tensors in zip(found, block, strict=True):
            own.update(tensors)
    assert len(np.unique(weights.round(6))) > 6
    for place, own in zip((5, 1), mixed_by_loops(states, view.losses, 1, (5, 1)), strict=True):
        assert list(own) == list(found[place])
        for name, tensor in own.items():
            np.testing.assert_allclose(found[place][name], tensor, rtol=1e-6)
    assert [own.keys() for own in mixed_by_loops(states, view.losses, 1)] == [own.keys() for own in found]


def test_the_time_of_a_few_mixtures_is_scaled_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        aggregation, "measured_apart", lambda clients, method, folder: aggregation.measure(clients, method, folder)
    )
    clock = iter([0.0, 1.0, 10.0, 14.0, 100.0, 101.0, 102.0])
    monkeypatch.setattr(aggregation.time, "perf_counter", lambda: next(clock))
    told = aggregation.against_loops(8, (0, 7), tmp_path)
    assert told["looped"] == 1.0 + (4.0 - 1.0) * 8 / 2
    assert told["ratio"] == told["looped"] / told["seconds"] == 13.0 / 2.0
    assert told["worst"] < 1e-8


def test_every_similarity_is_timed(tmp_path: Path) -> None:
    stack = aggregation.StoredAdapters.create(tmp_path / "before", aggregation.shapes(), 3)
    for client in range(3):
        stack.put(client, aggregation.draw(client))
    assert list(aggregation.measure_similarities(3, tmp_path)) == ["adapters", "updates", "products", "none"]


def test_the_command_that_measures_apart_is_one_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout='{"total": 2.0}')

    monkeypatch.setattr(aggregation.subprocess, "run", run)
    assert aggregation.measured_apart(3, "pplr", tmp_path, "server") == {"total": 2.0}
    assert asked[0][1:] == [
        *("-m", "benchmarks.aggregation", "--method", "pplr", "--what", "server"),
        *("--measure", "3", str(tmp_path)),
    ]
