"""MLflow: one run in a store of files in the run folder, or wherever ``MLFLOW_TRACKING_URI`` says."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit, urlunsplit

from pplr.runtimes.trackers.base import Outcome, Tracker, register
from pplr.storage import write_json

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

__all__ = ["QUIET", "UNLESS_SET", "MLflow", "without_secrets"]

QUIET: Final[Mapping[str, str]] = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
"""MLflow tells its makers how it is used unless these are set, some of it when it is imported."""

UNLESS_SET: Final[Mapping[str, str]] = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # else the one store that needs no further package is refused
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is gone holds a run up for seconds, not minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""What is set for MLflow unless the user did."""

_STORE, _RECORD = "mlruns", "mlflow.json"
_EXPERIMENT: Final = "pplr"
_MOST_METRICS, _MOST_PARAMETERS = 1000, 100
"""Most that a server takes at once."""
_STATUS: Final[Mapping[Outcome, str]] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


@register
class MLflow(Tracker):
    """Writes metrics and parameters of one MLflow run, whose id is kept in the run folder."""

    name = "mlflow"
    cure = (
        "Correct MLFLOW_TRACKING_URI, start its server, or unset it for a store in the run folder; without the "
        "folder's mlflow.json another MLflow run is begun."
    )

    def __init__(self) -> None:
        super().__init__()
        os.environ.update(QUIET)
        for name, value in UNLESS_SET.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._make_client = MlflowClient
        self._client: MlflowClient
        self._run = ""
        self._went_on = False

    def open(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Begin a run, or go on with the one that the run folder names, if it is in the same store."""
        asked = os.environ.get("MLFLOW_TRACKING_URI") or None
        self._client = self._make_client(tracking_uri=asked or (folder.resolve() / _STORE).as_uri())
        path, place = folder / _RECORD, asked and without_secrets(asked)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._went_on = bool(kept) and kept["tracking_uri"] == place
        if self._went_on:
            self._run = str(kept["run_id"])
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._begin(folder.resolve().name).info.run_id
            write_json(path, {"tracking_uri": place, "run_id": self._run})
        self._settle(settings)

    def _begin(self, name: str) -> Run:
        from pplr import __version__

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        return self._client.create_run(number, run_name=name, tags={"pplr.version": __version__})

    def _settle(self, settings: Mapping[str, str]) -> None:
        """Write the parameters that are not there yet."""
        from mlflow.entities import Param

        there = self._client.get_run(self._run).data.params if self._went_on else {}
        told = [Param(_legal(name), value) for name, value in settings.items() if _legal(name) not in there]
        for start in range(0, len(told), _MOST_PARAMETERS):
            self._client.log_batch(self._run, params=told[start : start + _MOST_PARAMETERS])

    def steps(self, tag: str) -> Iterable[int]:
        """Say at which steps the store has a value; of a run that has just begun, nowhere."""
        return [own.step for own in self._client.get_metric_history(self._run, _legal(tag))] if self._went_on else ()

    def append(self, step: int, points: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        told = [Metric(_legal(tag), value, now, step) for tag, value in points.items()]
        for start in range(0, len(told), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=told[start : start + _MOST_METRICS])

    def close(self, outcome: Outcome) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._run, _STATUS[outcome])


def _legal(name: str) -> str:
    """Write a tag as MLflow takes it: ``ndcg@10`` is ``ndcg_at_10``."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)


def without_secrets(address: str) -> str:
    """Leave a name and password out of an address.

    Example:
        >>> without_secrets("https://me:secret@host:5000")
        'https://host:5000'
    """
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
