"""Where a run's curves go while it runs, besides ``rounds.jsonl``: one file for each tracker.

A new tracker is a file that registers a subclass of :class:`Tracker`, an import here, and a contract test. A tracker
imports its library when it is made, so that runs without trackers load none.
"""

from pplr.runtimes.trackers.base import TRACKERS, Tracker, make_trackers, register
from pplr.runtimes.trackers.mlflow import MLflow
from pplr.runtimes.trackers.points import final_points, parameters, round_points
from pplr.runtimes.trackers.tensorboard import TensorBoard
from pplr.runtimes.trackers.tracking import Tracking

__all__ = [
    "TRACKERS",
    "MLflow",
    "TensorBoard",
    "Tracker",
    "Tracking",
    "final_points",
    "make_trackers",
    "parameters",
    "register",
    "round_points",
]
