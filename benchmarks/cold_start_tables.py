"""Tables of cold start: items and users of which training knows nothing, or next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.tables import Section, command, known_interval, table, where

RESULT = "cold_start"
METRICS = ("recall@10", "ndcg@10")
TITLES = {"unseen_items": "items that nobody took", "new_users": "users of whom one item is known"}


def cold_start_sections(name: str, told: dict[str, Any]) -> list[Section]:
    """Make the sections of what ``benchmarks.cold_start`` wrote.

    Args:
        name: Of its file in ``results/``.
        told: Its content.
    """
    start = command(told, "python -m benchmarks.cold_start")
    opening = f"`{start} --name {name}`; {where(told['machine'])}. Each seed draws other items and users."
    sections = [Section(name, f"Cold start: {name}", opening)]
    for kind, runs in told[RESULT].items():
        sections.append(Section(f"{name}-{kind}", f"{name}: {TITLES[kind]}", _table(runs), level=3))
    return sections


def _table(runs: Sequence[dict[str, Any]]) -> str:
    places = ("catalog", "among") if runs[0]["unseen"] else ("catalog",)
    shown = {"catalog": "", "among": " among the unseen"}
    head = ["model", "seeds", *(f"{metric}{shown[place]}" for place in places for metric in METRICS)]
    names = dict.fromkeys(name for run in runs for name in run["models"])
    rows = []
    for name in names:
        own = [run["models"][name] for run in runs if name in run["models"]]
        cells = [known_interval(one[place][metric] for one in own) for place in places for metric in METRICS]
        rows.append([name, str(len(own)), *cells])
    users = "/".join(str(run["users"]) for run in runs)
    notes = [f"- Test users, each with one target: {users}."]
    if runs[0]["unseen"]:
        items = "/".join(str(run["unseen"]) for run in runs)
        notes.append(f"- Unseen items: {items}. They are ranked in the full catalog, and among themselves.")
    tuned = [run["sasrec"]["chosen"] for run in runs if run["sasrec"]]
    if tuned:
        chosen = ", ".join(f"{own['n_factors']} factors and dropout {own['dropout_rate']}" for own in tuned)
        notes.append(f"- sasrec: settings by validation, for each seed: {chosen}.")
    return table(head, rows) + "\n\n" + "\n".join(notes)
