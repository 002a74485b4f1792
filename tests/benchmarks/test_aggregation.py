"""The measurement of aggregation on tiny adapters: the plain loops say what pplr says, and their time is scaled."""

from __future__ import annotations

import shutil
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


def test_the_loops_take_turns_with_three_runs_and_the_time_of_all_is_worked_out_from_medians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    now = [0.0]
    totals, mixtures = iter([2.0, 7.0, 3.0]), iter([5.0, 6.0, 40.0, 1.0])

    def apart(clients: int, method: str, folder: Path) -> dict[str, float]:
        turns.append("pplr")
        shutil.rmtree(folder / "after", ignore_errors=True)
        return aggregation.measure(clients, method, folder) | {"total": next(totals)}

    def loops(states, losses, server_round, some):
        turns.append(f"loops {list(some)}")
        now[0] += 1.0 + sum(next(mixtures) for _ in some)
        return mixed_by_loops(states, losses, server_round, some)

    monkeypatch.setattr(aggregation, "measured_apart", apart)
    monkeypatch.setattr(aggregation, "mixed_by_loops", loops)
    monkeypatch.setattr(aggregation.time, "perf_counter", lambda: now[0])
    told = aggregation.against_loops(8, (0, 7, 2, 3), tmp_path)
    assert turns[:4] == ["pplr", "loops []", "loops [0]", "pplr"]
    assert turns.count("pplr") == 3
    assert told["norms"]["median"] == 1.0
    assert told["mixture"] == {"median": 5.5, "lowest": 1.0, "highest": 40.0, "count": 4}
    assert told["looped"] == 1.0 + 8 * 5.5
    assert told["seconds"] == {"median": 3.0, "lowest": 2.0, "highest": 7.0, "count": 3}
    assert told["ratio"] == told["looped"] / 3.0
    assert told["worst"] < 1e-8
    assert "of which 4 mixtures were made and the rest worked out" in aggregation.told_of_loops(8, told)
    assert "worked out" not in aggregation.told_of_loops(4, told)


def test_a_mixture_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(clients: int, method: str, folder: Path) -> dict[str, float]:
        shutil.rmtree(folder / "after", ignore_errors=True)
        aggregation.measure(clients, "fedavg", folder)
        return {"total": 1.0}

    monkeypatch.setattr(aggregation, "measured_apart", wrong)
    assert aggregation.against_loops(4, (0,), tmp_path)["worst"] > 1e-6


def test_what_is_repeated_is_told_by_its_median_and_memory_by_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(
        [{"total": 3.0, "peak_rss_bytes": 5}, {"total": 1.0, "peak_rss_bytes": 9}, {"total": 2.0, "peak_rss_bytes": 7}]
    )
    monkeypatch.setattr(aggregation, "measured_apart", lambda *arguments: next(runs))
    assert aggregation.in_a_process(2, "pplr", times=3) == {"total": 2.0, "peak_rss_bytes": 9}


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
