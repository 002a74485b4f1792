"""MLflow's store, read by its own client."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import pplr
from pplr.errors import RunError
from pplr.runtimes.trackers import Tracking
from pplr.runtimes.trackers.mlflow import without_secrets
from pplr.testing.trackers import TrackerContract
from tests.runtimes.trackers.reading import mlflow_points, mlflow_run

pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _no_store_of_others(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)


class TestMLflow(TrackerContract):
    name = "mlflow"

    def read(self, folder):
        return mlflow_points(folder)

    def settings(self, folder):
        client, run = mlflow_run(folder)
        return str(client.get_run(run).data.params)


class TestMLflowElsewhere(TestMLflow):
    """The same in a store that MLFLOW_TRACKING_URI names."""

    @pytest.fixture(autouse=True)
    def _elsewhere(self, _no_store_of_others, tmp_path_factory, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path_factory.mktemp("store") / "all").as_uri())

    def test_nothing_is_stored_in_the_run_folder(self, tmp_path):
        self.opened(tmp_path).close("finished")
        assert [path.name for path in tmp_path.iterdir()] == ["mlflow.json"]


def test_a_run_says_how_it_ended_and_runs_again_when_it_goes_on(tmp_path):
    contract = TestMLflow()
    for outcome, status in (("stopped", "KILLED"), ("failed", "FAILED"), ("finished", "FINISHED")):
        tracker = contract.opened(tmp_path)
        client, run = mlflow_run(tmp_path)
        assert client.get_run(run).info.status == "RUNNING"
        tracker.close(outcome)
        assert client.get_run(run).info.status == status
    assert len(list((tmp_path / "mlruns").glob("*/*/metrics"))) == 1
    assert client.get_experiment(client.get_run(run).info.experiment_id).name == "pplr"


def test_nothing_says_who_ran_it(tmp_path):
    tracker = TestMLflow().opened(tmp_path)
    tracker.close("finished")
    client, run = mlflow_run(tmp_path)
    found = client.get_run(run)
    assert found.info.user_id == "unknown"
    assert found.data.tags == {"mlflow.runName": tmp_path.name, "pplr.version": pplr.__version__}


def test_in_another_store_all_points_are_written_again(tmp_path, monkeypatch):
    contract = TestMLflow()
    first = contract.opened(tmp_path / "run")
    first.write(1, {"loss/mean": 1.5})
    first.close("stopped")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "other").as_uri())
    second = contract.opened(tmp_path / "run")
    second.write(1, {"loss/mean": 1.5})
    second.close("finished")
    assert contract.read(tmp_path / "run") == {"loss/mean": [(1, 1.5)]}


def test_a_folder_that_was_moved_takes_its_store_along(tmp_path):
    contract = TestMLflow()
    first = contract.opened(tmp_path / "here")
    first.write(1, {"loss/mean": 1.5})
    first.close("stopped")
    (tmp_path / "here").rename(tmp_path / "there")
    second = contract.opened(tmp_path / "there")
    second.write(1, {"loss/mean": 1.5})
    second.write(2, {"loss/mean": 1.25})
    second.close("finished")
    assert contract.read(tmp_path / "there") == {"loss/mean": [(1, 1.5), (2, 1.25)]}


def test_a_password_in_an_address_is_not_kept():
    assert without_secrets("https://me:secret@host:5000/a?b=c") == "https://host:5000/a?b=c"
    assert without_secrets("file:///a/b") == "file:///a/b"


def test_a_server_that_does_not_answer_is_an_error_before_training(tmp_path, monkeypatch, small_config):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = Tracking(small_config("run.trackers=[mlflow]"), pytest.fail)
    with pytest.raises(RunError, match=r"mlflow cannot be opened: .*MLFLOW_TRACKING_URI"), tracking:
        tracking.begin(tmp_path)
    assert not list(tmp_path.iterdir())


def test_it_tells_its_makers_nothing(tmp_path):
    """In a process that looks like a user's, not like a test's."""
    code = """
        import socket, sys
        asked = []
        socket.getaddrinfo = lambda *a, **k: asked.append(a) or (_ for _ in ()).throw(OSError("no"))
        from pathlib import Path
        from pplr.runtimes.trackers import make_trackers
        (tracker,) = make_trackers(["mlflow"])
        tracker.open(Path(sys.argv[1]), {"a": "b"})
        tracker.write(1, {"loss/mean": 1.0})
        tracker.close("finished")
        from mlflow.telemetry import get_telemetry_client
        print(get_telemetry_client(), asked)
    """
    known = re.compile(r"CI$|^(PYTEST|GITHUB|BUILD|TF_|CODEBUILD|JENKINS|RUNBOT|TRAVIS|CIRCLE|MLFLOW|DO_NOT)")
    environment = {name: value for name, value in os.environ.items() if not known.search(name)}
    environment |= {"PYTHONPATH": str(Path(pplr.__file__).parents[1])}
    lines = "\n".join(line[8:] for line in code.splitlines())
    told = subprocess.run(
        [sys.executable, "-c", lines, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert told.stdout == "None []\n", told.stderr
