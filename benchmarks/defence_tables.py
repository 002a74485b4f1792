"""The table and the plot of trained defences: what a server reads, beside what recommendations are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import Section, table, where

__all__ = ["defence_section", "draw_defences"]

_METRIC = "item_f1"
_SHOWN = {_METRIC: "item F1", "target_hit@1": "target"}


def strongest(setting: Mapping[str, Any], metric: str) -> Mapping[str, float] | None:
    """Find what the attack that found most has found; none where no attack tells of that."""
    told = [own[metric] for own in setting["audits"] if own.get(metric)]
    return max(told, key=lambda own: float(own["mean"]), default=None)


def defence_section(name: str, told: Mapping[str, Any]) -> Section:
    """Make the section of one grid of defences.

    Args:
        name: The grid's.
        told: What ``benchmarks.state_defence`` wrote.
    """
    rows = told["defences"]
    passes = [own["passes"] for own in rows[0]["settings"]]
    every = [setting for row in rows for setting in row["settings"]]
    shown = {key: label for key, label in _SHOWN.items() if any(strongest(own, key) for own in every)}
    head = ["states", "model trained", rows[0]["metric"], "bits a state"]
    for own in passes:
        where_seen = "one pass" if own == 1 else f"{own} passes"
        head += [f"{label}, {where_seen}" for label in shown.values()]
    body: list[list[str]] = []
    for row in rows:
        guard = row["settings"][0]["guard"] or "as they are"
        trained = "under it" if row["trained_under_it"] else "without it"
        bits = "" if row["bits"] is None else f"{row['bits']:.2f}"
        cells = [guard, trained, _cell(row["worth"], 4), bits]
        for setting in row["settings"]:
            cells += [_cell(strongest(setting, metric)) for metric in shown]
        body.append(cells)
    guess = [_cell(rows[0]["baseline"][metric]) for metric in shown]
    body.append(["no states, popularity", "", "", "", *guess * len(passes)])
    attacks = sorted({own["audit"] for row in rows for setting in row["settings"] for own in setting["audits"]})
    note = (
        f"`{told['command']}`; {where(told['machine'])}. The strongest of {', '.join(attacks)}, by who has the "
        f"client's adapter and learned on states that are guarded alike; {rows[0]['users']} users, rankings of all; in "
        f"parentheses 95 % intervals (users resampled). {told['bits']:.2f} bits name an item by popularity. "
        f"Plot: [results/privacy/{name}.png](../results/privacy/{name}.png)."
    )
    parts = [table(head, body), note]
    if (own := told.get("differences")) is not None:
        parts.append(
            f"Were the noise of {own['defence']} one for each user and item while the input stage is trained on, what "
            f"crosses in two rounds, one less the other, would give an item F1 of {_cell(own[_METRIC])}, the mean "
            f"of {own['users']} users."
        )
    return Section(f"privacy-{name}", f"Trained defences: {name}", "\n\n".join(parts))


def _cell(told: Mapping[str, float] | None, digits: int = 2) -> str:
    if told is None:
        return ""
    if "low" not in told:
        return f"{told['mean']:.{digits}f}"
    return f"{told['mean']:.{digits}f} ({told['low']:.{digits}f} to {told['high']:.{digits}f})"


def draw_defences(told: Mapping[str, Any], path: Path) -> None:
    """Draw what is read against what recommendations are worth, one pass and many, with intervals over users."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows: Sequence[Mapping[str, Any]] = told["defences"]
    chart = Figure(figsize=(7, 4), layout="constrained")
    axes = chart.subplots()
    colours = colormaps["tab20"]
    for number, row in enumerate(rows):
        label = row["defence"] if row["trained_under_it"] else f"{row['defence']}, trained without"
        for place, setting in enumerate(row["settings"]):
            leak, worth = strongest(setting, _METRIC), row["worth"]
            if leak is None:
                continue
            low, high = (worth.get(key, worth["mean"]) for key in ("low", "high"))
            axes.errorbar(
                leak["mean"],
                worth["mean"],
                xerr=[[leak["mean"] - leak["low"]], [leak["high"] - leak["mean"]]],
                yerr=[[worth["mean"] - low], [high - worth["mean"]]],
                fmt="os^D"[place % 4],
                color=colours(number % 20),
                markerfacecolor=colours(number % 20) if place == 0 else "white",
                label=label if place == 0 else None,
                capsize=2,
            )
    guess = rows[0]["baseline"][_METRIC]
    axes.axvspan(guess["low"], guess["high"], color="0.9", zorder=0)
    axes.axvline(guess["mean"], color="0.5", linestyle="--", zorder=0)
    seen = ", ".join(str(own["passes"]) for own in rows[0]["settings"])
    axes.set(xlabel=f"item F1 of the strongest attack, passes {seen}", ylabel=rows[0]["metric"], xlim=(-0.02, 1.02))
    axes.set_ylim(bottom=0)
    chart.legend(fontsize=8, loc="outside right upper", frameon=False)
    chart.savefig(path, dpi=150)
