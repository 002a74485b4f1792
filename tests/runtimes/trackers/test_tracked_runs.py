"""Whole runs with both trackers, read back by their own readers and held against ``rounds.jsonl``."""

from __future__ import annotations

import pytest

from pplr.runtimes.launch import train
from pplr.runtimes.trackers import parameters
from tests.runtimes.trackers.reading import (
    approximately,
    check_trackers,
    event_reader,
    expected,
    mlflow_points,
    mlflow_run,
    tensorboard_points,
)

pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")

BOTH = "run.trackers=[tensorboard, mlflow]"


@pytest.fixture(autouse=True)
def _no_store_of_others(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class _Stops:
    """Stops a run when a server round is over."""

    def __init__(self, after, error):
        self.after, self.error, self.note = after, error, lambda line: None

    def task(self, label, total, unit):
        from pplr.progress import Silent

        return Silent().task(label, total, unit)

    def server_round(self, record):
        if record["server_round"] == self.after:
            raise self.error


def test_both_trackers_hold_every_round_the_figures_and_the_configuration(tmp_path, small_config, backbone):
    config = small_config(BOTH)
    run = train(config, tmp_path / "run", backbone=backbone)
    check_trackers(run)
    client, number = mlflow_run(run.folder)
    assert client.get_run(number).info.status == "FINISHED"
    assert client.get_run(number).data.params == parameters(config)
    (text,) = event_reader(run.folder).Tensors("config")
    for name, value in parameters(config).items():
        assert f"| {name} | {value} |" in text.tensor_proto.string_val[0].decode()


def test_a_stopped_run_goes_on_in_the_same_places_without_double_points(tmp_path, small_config, backbone):
    config = small_config(BOTH, "federation.rounds=4", "federation.patience=null")
    for after in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train(
                config,
                tmp_path / "run",
                backbone=backbone,
                resume=after > 1,
                progress=_Stops(after, KeyboardInterrupt()),
            )
    client, number = mlflow_run(tmp_path / "run")
    assert client.get_run(number).info.status == "KILLED"
    run = train(config, tmp_path / "run", backbone=backbone, resume=True)
    check_trackers(run)
    assert mlflow_run(tmp_path / "run")[1] == number
    assert len(client.search_runs([client.get_experiment_by_name("pplr").experiment_id])) == 1
    again = train(config, tmp_path / "run", backbone=backbone, resume=True)  # a finished one adds nothing
    for held in (mlflow_points(again.folder), tensorboard_points(again.folder)):
        assert {tag: len(own) for tag, own in held.items()} == {tag: len(own) for tag, own in expected(run).items()}


def test_what_a_tracker_missed_is_filled_in_when_the_run_goes_on(tmp_path, small_config, backbone, monkeypatch):
    from pplr.runtimes.trackers import MLflow

    real = MLflow.append

    def gone(self, step, points):
        if step > 1:
            raise ConnectionError("the server is gone")
        real(self, step, points)

    config = small_config(BOTH)
    with monkeypatch.context() as patch:
        patch.setattr(MLflow, "append", gone)
        run = train(config, tmp_path / "run", backbone=backbone)
    assert run.metrics
    assert mlflow_points(run.folder)["loss/mean"] == expected(run)["loss/mean"][:1]
    assert tensorboard_points(run.folder) == approximately(expected(run))
    train(config, tmp_path / "run", backbone=backbone, resume=True)
    held = mlflow_points(run.folder)
    for tag, points in expected(run).items():
        if tag != "run/seconds/evaluate":  # evaluating again took its own time
            assert held[tag] == points


def test_no_title_and_no_user_is_told(tmp_path, small_config, backbone, data_folder):
    run = train(small_config(BOTH), tmp_path / "run", backbone=backbone)
    titles = {title for title in run.assembly().data.dataset.catalog.titles if len(title) > 4}
    users = set(run.assembly().data.dataset.user_ids)
    kept = [path for place in ("mlruns", "tensorboard") for path in (run.folder / place).rglob("*") if path.is_file()]
    words = {word for path in kept for word in path.read_bytes().replace(b"\n", b" ").decode("latin-1").split()}
    assert kept
    assert not words & titles
    assert not words & users
