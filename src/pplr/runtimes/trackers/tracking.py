"""The trackers of one run: none of them can hold it up once it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pplr.config import Config
from pplr.errors import RunError
from pplr.runtimes.trackers.base import Outcome, Tracker, make_trackers
from pplr.runtimes.trackers.points import final_points, parameters, round_points

__all__ = ["Tracking"]

_Points = Callable[[Mapping[str, Any]], dict[str, float]]


class Tracking:
    """Tells a run's trackers of its rounds, as a context: they are closed with it.

    A tracker that fails while the run goes on is named in one line and told no more. What it lacks is filled in when
    the run goes on with ``resume``.

    Args:
        config: The run; ``run.trackers`` names them.
        note: Told of a tracker that failed.

    Raises:
        ConfigError: A tracker is unknown, or its extra is not installed.
    """

    def __init__(self, config: Config, note: Callable[[str], None]) -> None:
        self._config, self._note = config, note
        self._made = make_trackers(config.run.trackers)
        self._open: list[Tracker] = []
        self._told: set[int] = set()

    def begin(self, folder: Path) -> None:
        """Open every tracker, before the run trains.

        Args:
            folder: The run folder.

        Raises:
            RunError: One cannot be opened.
        """
        for tracker in self._made:
            try:
                tracker.open(folder, parameters(self._config))
            except Exception as error:
                raise RunError(f"{tracker.name} cannot be opened: {_short(error)}", cure=tracker.cure) from error
            self._open.append(tracker)

    def rounds(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Tell of all server rounds so far; those that were told already are passed over."""
        for record in records if self._open else ():
            server_round = int(record["server_round"])
            if server_round not in self._told:
                self._told.add(server_round)
                self._write(server_round, round_points, record)

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Tell of ``metrics.json``, at the last server round."""
        if self._open:
            self._write(max(self._told, default=0), final_points, metrics)

    def _write(self, step: int, points_of: _Points, content: Mapping[str, Any]) -> None:
        for tracker in list(self._open):
            try:
                tracker.write(step, points_of(content))
            except Exception as error:  # whatever it is, the run is worth more
                self._open.remove(tracker)
                self._note(
                    f"{tracker.name} failed and is told no more in this run ({_short(error)}). The run goes on, its "
                    "rounds.jsonl has everything, and --resume fills in what is missing."
                )
                with contextlib.suppress(Exception):
                    tracker.close("failed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome: Outcome = "finished" if kind is None else "failed" if issubclass(kind, Exception) else "stopped"
        for tracker in self._open:
            try:
                tracker.close(outcome)
            except Exception as failure:
                self._note(f"{tracker.name} could not be closed ({_short(failure)})")
        self._open = []


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
