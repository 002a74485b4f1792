"""Tables of how well attackers tell who was trained on, over the seeds of a membership audit."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.tables import Section, table, where

_WHO = {"server": "the server", "client": "another client", "outsider": "an outsider"}
_A = {"user": "a user", "interaction": "an interaction"}
_SHOWN = ("auc", "tpr@0.01", "tpr@0.001")


def membership_section(name: str, told: dict[str, Any]) -> Section:
    """Make the section of one membership audit.

    Args:
        name: The audit's.
        told: What ``benchmarks.membership`` wrote.
    """
    seeds = told["membership"]
    first = seeds[0]
    rows = []
    for number, attack in enumerate(first["attacks"]):
        over = [own["attacks"][number] for own in seeds]
        figures = [_cell([own[shown] for own in over]) for shown in _SHOWN]
        rows.append([_WHO[attack["attacker"]], attack["attack"].replace("_", " "), *figures])
    rows.append(["anyone", "no information", *(f"{first['baseline'][shown]:g}" for shown in _SHOWN)])
    head = ["attacker", "attack", "AUC", "found at 1 % false positives", "at 0.1 %"]
    losses = {key: statistics.fmean(own["loss"][key] for own in seeds) for key in ("base", "members", "non_members")}
    times = "" if len(seeds) == 1 else f", for each of {len(seeds)} seeds"
    note = (
        f"`{told['command']}`; {where(told['machine'])}. {first['trainings']} trainings of {first['rounds']} rounds"
        f"{times}, each attacked in turn with {first['shadows']} others as shadows: {first['members']} times "
        f"{_A[first['unit']]} that was in, {first['non_members']} times one that was left out, of {first['users']} "
        "users. In parentheses 95 % intervals (users resampled; of several seeds the widest). Empty where there are "
        f"too few that were left out. Loss under the adapter that the server has: {losses['members']:.3f} where the "
        f"{first['unit']} was in, {losses['non_members']:.3f} where it was left out, {losses['base']:.3f} before "
        "training."
    )
    return Section(f"privacy-{name}", f"Who was trained on: {name}", table(head, rows) + "\n\n" + note)


def _cell(seeds: list[dict[str, float] | None]) -> str:
    known = [own for own in seeds if own is not None]
    if not known:
        return ""
    mean = statistics.fmean(own["value"] for own in known)
    return f"{mean:.3f} ({min(own['low'] for own in known):.3f} to {max(own['high'] for own in known):.3f})"
