"""Where a figure is from: the command that printed it, the day, the machine, and the commit of pplr that it ran."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["LABELS", "ages", "commit_of", "machines", "origins_of", "place", "said"]

LABELS = ("before", "after")
"""Columns of the profiles, of which every job has an origin of its own."""
UNKNOWN = "a day that was not kept"

Origin = Mapping[str, Any]


def commit_of(folder: Path) -> str | None:
    """Name the commit that the files of a folder are of, and whether they were changed since.

    Returns:
        Nothing where git is not there or does not keep these files, as in an installed package.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout

    try:
        if not git("ls-files", "--", ".").strip():
            return None
        changed = ", changed" if git("status", "--porcelain", "--", ".").strip() else ""
        return git("rev-parse", "--short=10", "HEAD").strip() + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def place(origin: Origin) -> str:
    """Name what was measured on: device, processor, threads, and what its processor can do where that is known."""
    own = origin["machine"]
    device = origin.get("device", own.get("device"))
    parts = [own["processor"], f"{own['threads']} thread{'s' if own['threads'] != 1 else ''}"]
    return ", ".join([f"{device} beside {parts[0]}" if device else parts[0], parts[1], *_capability(own)])


def _capability(own: Mapping[str, Any]) -> list[str]:
    return [own["capability"]] if "capability" in own else []


def said(origin: Origin) -> str:
    """Say in a sentence when, on what, with which versions and at which commit something was measured."""
    own = origin["machine"]
    versions = [
        f"{name} {own[key]}"
        for name, key in (
            ("Python", "python"),
            ("torch", "torch"),
            ("transformers", "transformers"),
            ("peft", "peft"),
        )
        if key in own
    ]
    commit = f"; pplr at {origin['commit']}" if origin.get("commit") else ""
    return f"Measured on {origin.get('day', UNKNOWN)} on {place(origin)}, {', '.join(versions)}{commit}."


def origins_of(content: Mapping[str, Any]) -> list[tuple[str, Origin]]:
    """List where a result's figures are from, each with what it is the origin of; all of it where that is empty."""
    found: list[tuple[list[str], Origin]] = []
    for label in LABELS:
        for name, job in content.get(label, {}).items():
            same = [parts for parts, own in found if own == job["origin"] and parts[0] == label]
            if same:
                same[0].append(name)
            else:
                found.append(([label, name], job["origin"]))
    if found:
        return [(f"{label}: {', '.join(names)}", own) for (label, *names), own in found]
    return [("", content)]


def ages(named: Sequence[tuple[str, Origin]]) -> str:
    """Say which results are older than the newest."""
    days: dict[str, list[str]] = {}
    for name, origin in named:
        days.setdefault(origin.get("day", UNKNOWN), []).append(name)
    newest = max((day for day in days if day != UNKNOWN), default=UNKNOWN)
    older = [f"{_list(days[day])} on {day}" for day in sorted(days) if day != newest]
    if not older:
        return f"All were measured on {newest}."
    return f"The newest were measured on {newest}; older are {'; '.join(older)}."


def machines(named: Sequence[tuple[str, Origin]]) -> str:
    """Say which results are of another machine than most, or of the same with other threads or capability."""
    places: dict[str, list[str]] = {}
    for name, origin in named:
        places.setdefault(place(origin), []).append(name)
    usual, _ = Counter({own: len(names) for own, names in places.items()}).most_common(1)[0]
    others = [f"{_list(names)} on {own}" for own, names in places.items() if own != usual]
    if not others:
        return f"All were measured on {usual}."
    return f"Most were measured on {usual}; otherwise {'; '.join(others)}. Ratios of different machines do not compare."


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))
