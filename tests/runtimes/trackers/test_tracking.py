"""Trackers of a run: each point is told once, and one that fails takes nothing with it."""

from __future__ import annotations

import builtins
import json

import pytest

from pplr.errors import ConfigError, RunError
from pplr.runtimes import in_process
from pplr.runtimes.launch import train
from pplr.runtimes.trackers import TRACKERS, Tracker, Tracking, final_points, make_trackers, register, round_points

RESULTS = ("rounds.jsonl", "metrics.json", "clients/0/adapter_model.safetensors", "clients/2/adapter_model.safetensors")


class _Recorder(Tracker):
    """Keeps what it is told, and fails at a step."""

    name, cure = "recorder", "Mend the recorder."
    fails_at: object = None
    made: list[_Recorder] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.points, self.closed = {}, []
        self.made.append(self)

    def open(self, folder, settings):
        if self.fails_at == "open":
            raise OSError("no such store")

    def steps(self, tag):
        return ()

    def append(self, step, points):
        if self.fails_at == step:
            raise OSError(28, "No space left on device")
        self.points.setdefault(step, {}).update(points)

    def close(self, outcome):
        self.closed.append(outcome)
        if self.fails_at == "close":
            raise OSError("gone")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(TRACKERS, "recorder", _Recorder)
    monkeypatch.setattr(_Recorder, "made", [])
    monkeypatch.setattr(_Recorder, "fails_at", None)
    return _Recorder


class _Listener:
    """Keeps the lines of a run, and everything else as no one does."""

    def __init__(self, at_round=lambda record: None):
        self.lines, self.server_round = [], at_round
        self.note, self.task = self.lines.append, in_process.Silent().task


def timeless(folder, name):
    """Read a result; what clocks say of two runs is never equal."""
    path = folder / name
    if name == "rounds.jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [{**r, "clients": {n: c | {"seconds": 0} for n, c in r["clients"].items()}} for r in records]
    if name == "metrics.json":
        return json.loads(path.read_text()) | {"seconds": 0, "samples_per_second": 0}
    return path.read_bytes()


def test_a_run_is_told_from_its_records_and_is_the_run_without_trackers(
    tmp_path, small_config, backbone, finished, recorder
):
    run = train(small_config("run.trackers=[recorder, recorder]"), tmp_path / "run", backbone=backbone)
    (told,) = recorder.made
    first, last = run.rounds
    assert told.points == {1: round_points(first), 2: round_points(last) | final_points(run.metrics)}
    assert told.closed == ["finished"]
    assert {"loss/mean", "heating_weight/client/2", "similarity/lowest", "bytes_up/total"} <= set(told.points[1])
    plain = finished()
    for name in RESULTS:
        assert timeless(run.folder, name) == timeless(plain.folder, name)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_tracker_that_fails_is_named_once_and_the_run_is_whole(
    tmp_path, small_config, backbone, finished, recorder, fails_at, monkeypatch
):
    monkeypatch.setattr(recorder, "fails_at", fails_at)
    heard = _Listener()
    run = train(small_config("run.trackers=[recorder]"), tmp_path / "run", backbone=backbone, progress=heard)
    (line,) = [line for line in heard.lines if "recorder" in line]
    assert line.startswith("recorder failed and is told no more in this run (OSError: [Errno 28] No space left")
    assert "--resume fills in" in line
    (told,) = recorder.made
    assert sorted(told.points) == list(range(1, fails_at))
    assert told.closed == ["failed"]
    assert timeless(run.folder, "metrics.json") == timeless(finished().folder, "metrics.json")


def test_a_tracker_that_cannot_be_closed_is_named_and_the_run_is_whole(
    tmp_path, small_config, backbone, recorder, monkeypatch
):
    monkeypatch.setattr(recorder, "fails_at", "close")
    heard = _Listener()
    run = train(small_config("run.trackers=[recorder]"), tmp_path / "run", backbone=backbone, progress=heard)
    assert run.metrics
    assert "recorder could not be closed (OSError: gone)" in heard.lines


def test_one_that_fails_leaves_the_others_alone(tmp_path, small_config, recorder, monkeypatch):
    class Other(_Recorder):
        name, fails_at = "other", None

    monkeypatch.setitem(TRACKERS, "other", Other)
    monkeypatch.setattr(recorder, "fails_at", 1)
    heard = []
    with Tracking(small_config("run.trackers=[recorder, other]"), heard.append) as tracking:
        tracking.begin(tmp_path)
        records = [{"server_round": n, "similarity": None, "clients": {"0": {"loss": 1.0 * n}}} for n in (1, 2)]
        tracking.rounds(records[:1])
        tracking.rounds(records)
    broken, whole = recorder.made
    assert (broken.points, broken.closed) == ({}, ["failed"])
    assert {step: own["loss/mean"] for step, own in whole.points.items()} == {1: 1.0, 2: 2.0}
    assert len(heard) == 1


def test_what_cannot_be_read_ends_the_tracking_alone(tmp_path, small_config, recorder):
    heard = []
    with Tracking(small_config("run.trackers=[recorder]"), heard.append) as tracking:
        tracking.begin(tmp_path)
        tracking.rounds([{"server_round": 1, "similarity": None, "clients": {"0": {"loss": "high"}}}])
    assert [line.split(" (")[0] for line in heard] == ["recorder failed and is told no more in this run"]


def test_what_cannot_be_opened_is_an_error_before_training(tmp_path, small_config, backbone, recorder, monkeypatch):
    monkeypatch.setattr(recorder, "fails_at", "open")
    heard = _Listener(at_round=pytest.fail)
    with pytest.raises(RunError, match=r"recorder cannot be opened: OSError: no such store\. Mend the recorder\."):
        train(small_config("run.trackers=[recorder]"), tmp_path / "run", backbone=backbone, progress=heard)


@pytest.mark.parametrize(("error", "outcome"), [(KeyboardInterrupt, "stopped"), (RuntimeError, "failed")])
def test_how_a_run_ended_is_told(tmp_path, small_config, recorder, error, outcome):
    def run():
        with Tracking(small_config("run.trackers=[recorder]"), pytest.fail) as tracking:
            tracking.begin(tmp_path)
            raise error

    with pytest.raises(error):
        run()
    assert recorder.made[0].closed == [outcome]


def test_an_unknown_tracker_is_refused_with_the_nearest_before_anything_is_touched(tmp_path, small_config):
    with pytest.raises(ConfigError, match=r"no tracker is called 'tensorbord'\. Did you mean 'tensorboard'"):
        train(small_config("run.trackers=[tensorbord]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_extra_is_an_error_with_its_cure_before_anything_is_touched(
    tmp_path, small_config, monkeypatch, name
):
    real = builtins.__import__

    def without(module, *args, **options):
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=rf"names {name}, and {name} is not installed\. .*'pplr\[{name}\]'"):
        train(small_config(f"run.trackers=[{name}]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_registered_by_its_name(monkeypatch):
    monkeypatch.setitem(TRACKERS, "recorder", None)
    assert register(_Recorder) is _Recorder
    assert TRACKERS["recorder"] is _Recorder
    assert make_trackers([]) == []
