"""What every tracker must do, as a class of tests to inherit: hold each point once, whatever happened before."""
# ruff: noqa: S101  (a contract is made of assertions)

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from pplr.runtimes.trackers import Tracker, make_trackers

__all__ = ["TrackerContract"]

_SETTINGS = {"federation.method": "pplr", "backbone.prompt.instruction": "a | b\nc"}
_ONE = {"loss/mean": 1.5, "validation/ndcg@10/client/north-1.a": 0.25}
_TWO = {"loss/mean": 1.25, "bytes_up/total": 2.0**40}


class TrackerContract:
    """A tracker's tests.

    Attributes:
        name: The tracker's.
    """

    name: ClassVar[str]

    @abstractmethod
    def read(self, folder: Path) -> dict[str, list[tuple[int, float]]]:
        """Read every point of a run folder with the library's own reader: step and value, by the tag as pplr has it."""

    @abstractmethod
    def settings(self, folder: Path) -> str:
        """Read the configuration's fields, as text that holds their names and values."""

    def opened(self, folder: Path) -> Tracker:
        """Open the tracker for a run folder."""
        folder.mkdir(exist_ok=True)
        (tracker,) = make_trackers([self.name])
        tracker.open(folder, _SETTINGS)
        return tracker

    def test_what_is_written_is_read_at_its_step(self, tmp_path: Path) -> None:
        """Two steps, before anything is closed."""
        tracker = self.opened(tmp_path / "a run")
        tracker.write(1, _ONE)
        tracker.write(2, _TWO)
        points = self.read(tmp_path / "a run")
        tracker.close("finished")
        assert points == {
            "loss/mean": [(1, 1.5), (2, 1.25)],
            "validation/ndcg@10/client/north-1.a": [(1, 0.25)],
            "bytes_up/total": [(2, 2.0**40)],
        }

    def test_going_on_adds_what_is_missing_and_nothing_twice(self, tmp_path: Path) -> None:
        """The second process is told all rounds again, and a point that the first one missed."""
        for way in ("closed", "killed"):
            folder = tmp_path / way
            folder.mkdir()
            first = self.opened(folder)
            first.write(1, {"loss/mean": 1.5})
            if way == "closed":
                first.close("stopped")
            second = self.opened(folder)
            for _ in range(2):
                second.write(1, _ONE)
                second.write(2, _TWO)
            second.close("finished")
            found = self.read(folder)
            if way == "killed":
                first.close("stopped")
            assert found["loss/mean"] == [(1, 1.5), (2, 1.25)], way
            assert {tag: len(points) for tag, points in found.items() if tag != "loss/mean"} == {
                "validation/ndcg@10/client/north-1.a": 1,
                "bytes_up/total": 1,
            }, way

    def test_settings_are_written_once(self, tmp_path: Path) -> None:
        """They are there however often the run goes on."""
        for _ in range(3):
            self.opened(tmp_path).close("finished")
        told = self.settings(tmp_path)
        assert told.count("federation.method") == told.count("pplr") == 1
        assert "backbone.prompt.instruction" in told

    def test_runs_of_two_folders_are_apart(self, tmp_path: Path) -> None:
        """A store of its own for each, or a run of its own in one store."""
        for name in ("a", "b"):
            tracker = self.opened(tmp_path / name)
            tracker.write(1, _ONE)
            tracker.close("finished")
        assert self.read(tmp_path / "a") == self.read(tmp_path / "b")
        assert len(self.read(tmp_path / "a")["loss/mean"]) == 1
