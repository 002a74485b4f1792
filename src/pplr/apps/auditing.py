"""``pplr audit``: what a run's server can read, in tables, a plot and one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pplr.apps.tables import Table, figure
from pplr.errors import ConfigError, RunError
from pplr.privacy.verdict import is_within_reach, own_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "SHOWN",
    "SWEPT_NOISES",
    "SWEPT_WIRE",
    "audit_tables",
    "draw_frontier",
    "frontier",
    "label_of",
    "parse_cuts",
    "read_beside",
    "sweep_cuts",
]

SHOWN = ("token_recovery", "item_f1", "target_hit@1")
"""Metrics of the table; ``audit.json`` has all."""
_SWEPT_INPUT, _SWEPT_OUTPUT = (0, 1, 2, 4, 8), (0, 1, 2)
SWEPT_NOISES = (0.0, 0.5, 2.0)
"""Noise levels of a sweep, as multiples of the states' own size."""
SWEPT_WIRE = "int8"
"""Wire format of a sweep beside the run's own: the one that rounds most."""
_FEWEST_AFTER = "tab:red"
"""Colour of the fewest output blocks, in a drawing of several."""


def parse_cuts(told: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Read cuts such as ``2,1``.

    Raises:
        ConfigError: One is not two whole numbers.
    """
    cuts = []
    for own in told:
        parts = own.split(",")
        if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
            raise ConfigError(f"the cut {own!r}", cure="Give k and m, such as --cut 2,1.")
        cuts.append((int(parts[0]), int(parts[1])))
    return tuple(cuts)


def sweep_cuts(total_layers: int) -> tuple[tuple[int, int], ...]:
    """List the cuts of a sweep that leave the server a block.

    Example:
        >>> sweep_cuts(3)
        ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))
    """
    return tuple((k, m) for k in _SWEPT_INPUT for m in _SWEPT_OUTPUT if k + m < total_layers)


def audit_tables(content: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Lay out each setting: a heading, and a row for each attack, with that of a guess without any state."""
    tables = []
    for found in content["settings"]:
        cut, worth = found["cut"], found["worth"]
        heading = f"k {cut['input_layers']}, m {cut['output_layers']} of {cut['total_layers']} blocks"
        heading += f", {found['guard']}" if found.get("guard") else ""
        heading += f", noise {found['noise']:g}" if found["noise"] else ""
        heading += (
            f", {found['wire']} on the wire" if found.get("wire", content.get("wire")) != content.get("wire") else ""
        )
        heading += f", mean of {found['passes']} passes" if found.get("passes", 1) > 1 else ""
        heading += f", {found['pairs']} pairs" if len({own.get("pairs") for own in content["settings"]}) > 1 else ""
        heading += f"; {content['metric']} {figure(worth['mean'])} of {worth['users']} users"
        if bare := found.get("worth_unguarded"):
            heading += f", {figure(bare['mean'])} of {bare['users']} with the same adapters and nothing done to states"
        rows = [
            (
                own["audit"],
                own["knowledge"],
                *(_cell(own[name]) for name in SHOWN),
                _scored(own),
                figure(own["seconds"], digits=1),
            )
            for own in found["audits"]
        ]
        rows.append(("no states", "popularity", *(_cell(content["baseline"][name]) for name in SHOWN), "", ""))
        table = Table(
            ("attack", "has", *SHOWN, "users", "seconds"), rows, texts=("attack", "has"), ruled=[len(rows) - 1]
        )
        tables.append((heading, table))
    return tables


def _cell(told: Mapping[str, float] | None) -> str:
    return "-" if told is None else f"{told['mean']:.2f} ({told['low']:.2f} to {told['high']:.2f})"


def _scored(own: Mapping[str, Any]) -> str:
    """Say of how many users the figures are: the fewest where metrics differ."""
    counts = [found["users"] for name in SHOWN if (found := own[name]) is not None and "users" in found]
    return figure(min(counts)) if counts else ""


def read_beside(folder: Path) -> tuple[str, dict[str, Any]]:
    """Read the audit of another run that is to stand on the same plot: its label and its ``audit.json``.

    Raises:
        RunError: It was not audited.
    """
    path = folder / "audit.json"
    if not path.exists():
        raise RunError(f"{folder} was not audited", cure=f"Run `pplr audit {folder}` first.")
    return label_of(folder), json.loads(path.read_text(encoding="utf-8"))


def label_of(folder: Path) -> str:
    """Name a run on a plot that shows several: its folder, and its ε where it was trained with user-level privacy."""
    metrics = folder / "metrics.json"
    private = json.loads(metrics.read_text(encoding="utf-8")).get("privacy") if metrics.exists() else None
    return folder.name if private is None else f"{folder.name}, users' ε {max(private['epsilon'].values()):.3g}"


def draw_frontier(
    content: Mapping[str, Any],
    path: Path,
    metric: str = "item_f1",
    beside: Sequence[tuple[str, Mapping[str, Any]]] = (),
    label: str | None = None,
) -> None:
    """Draw leakage against what recommendations are worth, a point for each setting, by its strongest attack.

    Args:
        content: Of ``audit.json``.
        path: Of the PNG.
        metric: Leakage, by name.
        beside: Labels and audits of other runs, of each the settings as the run is, else all.
        label: Of the run itself, where others stand beside it.
    """
    chart = frontier(content, metric, beside, label)
    chart.suptitle(f"What the server reads, and what recommendations are worth: {content['backbone']}", fontsize=9)
    chart.savefig(path, dpi=150)


def _point(axes: Any, found: Mapping[str, Any], metric: str, **style: Any) -> None:
    """Draw a setting by its strongest attack that is within reach, with both intervals."""
    levels = {own["knowledge"] for own in found["audits"]}
    reached = [own for own in found["audits"] if is_within_reach(own["knowledge"], levels)]
    told = [own[metric] for own in reached if own.get(metric)]
    if not told:
        return
    leak, worth = max(told, key=lambda own: own["mean"]), found["worth"]
    low, high = (worth.get(end, worth["mean"]) for end in ("low", "high"))
    axes.errorbar(
        leak["mean"],
        worth["mean"],
        xerr=[[leak["mean"] - leak["low"]], [leak["high"] - leak["mean"]]],
        yerr=[[max(0.0, worth["mean"] - low)], [max(0.0, high - worth["mean"])]],
        markerfacecoloralt="white",
        capsize=2,
        elinewidth=0.8,
        **style,
    )


def frontier(
    content: Mapping[str, Any],
    metric: str = "item_f1",
    beside: Sequence[tuple[str, Mapping[str, Any]]] = (),
    label: str | None = None,
) -> Figure:
    """Make the drawing of :func:`draw_frontier`, without its title.

    Marks tell depths apart, their filling noise, and grey is another wire format; other runs have marks of their own.
    Where numbers of output blocks differ, as few as there are have a colour: what comes back there tells most.
    """
    from matplotlib.figure import Figure

    chart = Figure(figsize=(4.9, 3.8), layout="constrained")
    axes = chart.subplots()
    noises = sorted({found["noise"] for found in content["settings"]})
    fills: dict[float, Any] = dict(zip(noises, ("full", "none", "left", "bottom", "right", "top"), strict=False))
    depths = sorted({found["cut"]["input_layers"] for found in content["settings"]})
    marks = dict(zip(depths, "osD^v<>", strict=False))
    wires = list(dict.fromkeys(found.get("wire") or content.get("wire") for found in content["settings"]))
    after = sorted({found["cut"]["output_layers"] for found in content["settings"]})
    tones = {depth: _FEWEST_AFTER if len(after) > 1 and depth == after[0] else "black" for depth in after}
    for found in content["settings"]:
        usual = (found.get("wire") or content.get("wire")) == wires[0]
        mark, fill = marks.get(found["cut"]["input_layers"], "o"), fills.get(found["noise"], "none")
        tone = tones[found["cut"]["output_layers"]] if usual else "0.55"
        _point(axes, found, metric, fmt=mark, fillstyle=fill, color=tone)
    for (name, other), mark in zip(beside, cycle("X*Ph"), strict=False):
        for found in own_settings(other) or other["settings"]:
            _point(axes, found, metric, fmt=mark, color="black", markersize=9)
        axes.plot([], [], mark, color="black", label=name)
    guess = content["baseline"][metric]
    if guess is not None:
        axes.axvspan(guess["low"], guess["high"], color="0.9", zorder=0)
        axes.axvline(guess["mean"], color="0.5", linestyle="--", zorder=0)
        axes.annotate(
            "a guess without states",
            (guess["mean"], 0.03),
            xytext=(3, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            fontsize=8,
        )
    whose = f"{label}, " if label else ""
    for depth in depths:
        axes.plot([], [], marks.get(depth, "o"), color="black", label=f"{whose}k = {depth}")
    for noise in noises if len(noises) > 1 else ():
        fill = fills.get(noise, "none")
        axes.plot([], [], "o", color="black", fillstyle=fill, markerfacecoloralt="white", label=f"noise {noise:g}")
    if len(after) > 1:
        axes.plot([], [], "o", color=_FEWEST_AFTER, label=f"m = {after[0]}")
        axes.plot([], [], "o", color="black", label=f"m = {', '.join(map(str, after[1:]))}")
    for wire in wires[1:]:
        axes.plot([], [], "o", color="0.55", label=f"{wire} on the wire")
    axes.set(xlabel=f"{metric} of the strongest attack (0 to 1)", ylabel=f"{content['metric']}", xlim=(-0.02, 1.02))
    axes.set_ylim(bottom=0)
    chart.legend(loc="outside lower left", ncols=5, fontsize=8, frameon=False, handlelength=1.2, columnspacing=1.2)
    return chart
