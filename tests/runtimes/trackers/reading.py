"""What a run folder's trackers hold, read by their own libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pplr.runtimes.trackers import final_points, make_trackers, round_points


def event_reader(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return reader


def tensorboard_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = event_reader(folder)
    return {tag: [(own.step, own.value) for own in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def mlflow_run(folder: Path):
    make_trackers(["mlflow"])  # so that a store of files is allowed
    from mlflow.tracking import MlflowClient

    kept = json.loads((folder / "mlflow.json").read_text())
    return MlflowClient(tracking_uri=kept["tracking_uri"] or (folder / "mlruns").as_uri()), kept["run_id"]


def mlflow_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    client, run = mlflow_run(folder)
    return {
        re.sub(r"_at_(?=\d)", "@", tag): [(own.step, own.value) for own in client.get_metric_history(run, tag)]
        for tag in client.get_run(run).data.metrics
    }


def expected(run):
    """Put together what trackers must hold, from the run's files."""
    found = {}
    for record in run.rounds:
        for tag, value in round_points(record).items():
            found.setdefault(tag, []).append((record["server_round"], value))
    for tag, value in final_points(run.metrics).items():
        found.setdefault(tag, []).append((run.rounds[-1]["server_round"], value))
    return found


def approximately(points):
    """Values as event files hold them, in single precision."""
    return {tag: [(step, pytest.approx(value, rel=1e-6)) for step, value in own] for tag, own in points.items()}


def check_trackers(run):
    """Hold both trackers against the run's files."""
    assert mlflow_points(run.folder) == expected(run)
    assert tensorboard_points(run.folder) == approximately(expected(run))
