"""What a tracker is: it is opened for a run folder, told points, and closed; and it holds no point twice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from pplr.errors import ConfigError, nearest

__all__ = ["TRACKERS", "Outcome", "Tracker", "make_trackers", "register"]

Outcome = Literal["finished", "failed", "stopped"]
"""How a run ended: whole, by an error, or by a person."""


class Tracker(ABC):
    """A place for curves, in a file of its own, which imports its library when it is made.

    What goes wrong in it may be raised as it is: before training that ends the run, later it ends the tracking alone.

    Attributes:
        name: How ``run.trackers`` asks for it, and the extra that installs it.
        cure: What to do when it cannot be opened.
    """

    name: ClassVar[str]
    cure: ClassVar[str]

    def __init__(self) -> None:
        self._known: dict[str, set[int]] = {}

    def write(self, step: int, points: Mapping[str, float]) -> None:
        """Write the points of a step that are not there yet.

        Args:
            step: The server round, from 1.
            points: Values by tag, such as ``loss/mean``.
        """
        known = {tag: self._steps(tag) for tag in points}
        if new := {tag: value for tag, value in points.items() if step not in known[tag]}:
            self.append(step, new)
        for steps in known.values():
            steps.add(step)

    def _steps(self, tag: str) -> set[int]:
        if tag not in self._known:
            self._known[tag] = set(self.steps(tag))
        return self._known[tag]

    @abstractmethod
    def open(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Begin a run, or go on with the one that the run folder began.

        Args:
            folder: The run folder.
            settings: The configuration's fields; written once.
        """

    @abstractmethod
    def steps(self, tag: str) -> Iterable[int]:
        """Say at which steps a tag had a value when the run was opened."""

    @abstractmethod
    def append(self, step: int, points: Mapping[str, float]) -> None:
        """Write points; when it returns they outlive this process."""

    @abstractmethod
    def close(self, outcome: Outcome) -> None:
        """Let go of what is open."""


TRACKERS: dict[str, type[Tracker]] = {}

TrackerT = TypeVar("TrackerT", bound=Tracker)


def register(tracker: type[TrackerT]) -> type[TrackerT]:
    """Register a tracker under its ``name``; used as a decorator."""
    TRACKERS[tracker.name] = tracker
    return tracker


def make_trackers(names: Sequence[str]) -> list[Tracker]:
    """Make the trackers that ``run.trackers`` names, each once.

    Raises:
        ConfigError: There is none of that name, or its extra is not installed.
    """
    made: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            raise ConfigError(f"run.trackers: no tracker is called {name!r}", cure=nearest(name, TRACKERS))
        try:
            made.append(TRACKERS[name]())
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"run.trackers names {name}, and {error.name} is not installed",
                cure=f"Install it with: pip install 'pplr[{name}]'",
            ) from error
    return made
