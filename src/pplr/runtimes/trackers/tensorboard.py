"""TensorBoard: event files in the run folder, for ``tensorboard --logdir``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pplr.runtimes.trackers.base import Outcome, Tracker, register

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter

__all__ = ["TensorBoard"]

_FOLDER = "tensorboard"
_SETTINGS = "config"


@register
class TensorBoard(Tracker):
    """Writes a new event file each time that a run begins or goes on, in one folder.

    Each round is on the disk before the next one begins, and what the disk refuses is known at once; TensorBoard's own
    writer leaves both to a thread. A file that was cut off by a kill is read up to there.
    """

    name = "tensorboard"
    cure = "Choose a run folder that can be written, or move its tensorboard folder away."

    def __init__(self) -> None:
        super().__init__()
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._there: dict[str, set[int]]
        self._writer: RecordWriter

    def open(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Read which points are there already, and begin a file for the others."""
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        place = folder / _FOLDER
        place.mkdir(exist_ok=True)
        files = len(list(place.glob("*tfevents*")))
        self._there = _read(place) if files else {}
        path = place / f"events.out.tfevents.{int(time.time()):010d}.{files}"
        self._writer = RecordWriter(path.open("xb"))
        self._put(file_version="brain.Event:2")
        if _SETTINGS not in self._there:
            rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in settings.items())
            self._put(step=0, summary=text_pb(_SETTINGS, f"| field | value |\n| --- | --- |\n{rows}"))
        self._writer.flush()

    def steps(self, tag: str) -> Iterable[int]:
        """Say at which steps the folder has a value."""
        return self._there.get(tag, ())

    def append(self, step: int, points: Mapping[str, float]) -> None:
        """Write one event for all points of a step."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        self._put(step=step, summary=self._summary(value=values))
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        """Close the file."""
        self._writer.close()

    def _put(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())


def _read(place: Path) -> dict[str, set[int]]:
    """Read at which steps every tag has a value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place), size_guidance={"scalars": 0, "tensors": 1})
    events.Reload()
    tags = events.Tags()
    found = {tag: {own.step for own in events.Scalars(tag)} for tag in tags["scalars"]}
    return found | {tag: {0} for tag in tags["tensors"]}
