"""The page on trackers names what they are told, and its commands are commands."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

from pplr.config_files import load_config
from pplr.runtimes.trackers import TRACKERS, final_points, round_points
from pplr.runtimes.trackers.mlflow import QUIET, UNLESS_SET

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "trackers.md").read_text(encoding="utf-8")


def test_the_table_names_every_tag_that_is_told_and_no_other(finished):
    run = finished("evaluation.before=true")
    private = {"0": {"epsilon": 1.0}}
    points = [*round_points(run.rounds[-1]), *final_points(run.metrics)]
    points += round_points({"server_round": 1, "similarity": None, "clients": private})
    metrics = dict.fromkeys([*run.metrics["overall"], "loss", "users"], "METRIC")
    told = set()
    for tag in points:
        first, *rest = tag.split("/")
        if first in ("validation", "test", "before"):
            told.add(f"{first}/{metrics[rest[0]]}")
        elif first == "floors":
            told.add("floors/FLOOR/METRIC")
        elif first == "run":
            told.add(f"run/{rest[0]}" + ("/..." if rest[1:] else ""))
        else:
            told.add(first)
    rows = re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)
    named = {tag for row in rows for tag in re.findall(r"`([^`]+)`", row)}
    assert named == told


def test_the_command_asks_for_every_tracker():
    (line,) = re.findall(r"^pplr (train .*)$", PAGE, flags=re.MULTILINE)
    _, path, *options = shlex.split(line)
    config = load_config(ROOT / path, [value for flag, value in pairwise(options) if flag == "--set"])
    assert set(config.run.trackers) == set(TRACKERS)


def test_every_variable_that_is_set_is_named():
    assert all(f"{name}={value}" in PAGE for name, value in QUIET.items())
    assert all(name in PAGE for name in UNLESS_SET)
