"""``pplr audit``: what a run's server can read, in tables, a plot and one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pplr.apps.tables import Table, figure
from pplr.errors import ConfigError
from pplr.privacy.verdict import is_within_reach

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SHOWN", "audit_tables", "draw_frontier", "frontier", "parse_cuts", "sweep_cuts"]

SHOWN = ("token_recovery", "item_f1", "target_hit@1")
"""Metrics of the table; ``audit.json`` has all."""
_SWEPT_INPUT, _SWEPT_OUTPUT = (0, 1, 2, 4, 8), (0, 1, 2)
SWEPT_NOISES = (0.0, 0.5, 2.0)
"""Noise levels of a sweep, as multiples of the states' own size."""


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
        heading += f", mean of {found['passes']} passes" if found.get("passes", 1) > 1 else ""
        heading += f"; {content['metric']} {figure(worth['mean'])} of {worth['users']} users"
        if bare := found.get("worth_unguarded"):
            heading += f", {figure(bare['mean'])} of {bare['users']} with the same adapters and nothing done to states"
        rows = [
            (own["audit"], own["knowledge"], *(_cell(own[name]) for name in SHOWN), figure(own["seconds"], digits=1))
            for own in found["audits"]
        ]
        rows.append(("no states", "popularity", *(_cell(content["baseline"][name]) for name in SHOWN), ""))
        table = Table(("attack", "has", *SHOWN, "seconds"), rows, texts=("attack", "has"), ruled=[len(rows) - 1])
        tables.append((heading, table))
    return tables


def _cell(told: Mapping[str, float] | None) -> str:
    return "-" if told is None else f"{told['mean']:.2f} ({told['low']:.2f} to {told['high']:.2f})"


def draw_frontier(content: Mapping[str, Any], path: Path, metric: str = "item_f1") -> None:
    """Draw leakage against what recommendations are worth, a point for each setting, by its strongest attack.

    Args:
        content: Of ``audit.json``.
        path: Of the PNG.
        metric: Leakage, by name.
    """
    chart = frontier(content, metric)
    chart.suptitle(f"What the server reads, and what recommendations are worth: {content['backbone']}", fontsize=9)
    chart.savefig(path, dpi=150)


def frontier(content: Mapping[str, Any], metric: str = "item_f1") -> Figure:
    """Make the drawing of :func:`draw_frontier`, without its title; marks and their filling tell settings apart."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(4.9, 3.8), layout="constrained")
    axes = chart.subplots()
    noises = sorted({found["noise"] for found in content["settings"]})
    fills: dict[float, Any] = dict(zip(noises, ("full", "none", "left", "bottom", "right", "top"), strict=False))
    depths = sorted({found["cut"]["input_layers"] for found in content["settings"]})
    marks = dict(zip(depths, "osD^vP*X", strict=False))
    for found in content["settings"]:
        levels = {own["knowledge"] for own in found["audits"]}
        reached = [own for own in found["audits"] if is_within_reach(own["knowledge"], levels)]
        told = [own[metric] for own in reached if own.get(metric)]
        if not told:
            continue
        leak, worth = max(told, key=lambda own: own["mean"]), found["worth"]
        axes.errorbar(
            leak["mean"],
            worth["mean"],
            xerr=[[leak["mean"] - leak["low"]], [leak["high"] - leak["mean"]]],
            yerr=[
                [worth["mean"] - worth.get("low", worth["mean"])],
                [worth.get("high", worth["mean"]) - worth["mean"]],
            ],
            fmt=marks.get(found["cut"]["input_layers"], "o"),
            fillstyle=fills.get(found["noise"], "none"),
            color="black",
            markerfacecoloralt="white",
            capsize=2,
            elinewidth=0.8,
        )
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
    for depth in depths:
        axes.plot([], [], marks.get(depth, "o"), color="black", label=f"k = {depth}")
    for noise in noises if len(noises) > 1 else ():
        fill = fills.get(noise, "none")
        axes.plot([], [], "o", color="black", fillstyle=fill, markerfacecoloralt="white", label=f"noise {noise:g}")
    axes.set(xlabel=f"{metric} of the strongest attack (0 to 1)", ylabel=f"{content['metric']}", xlim=(-0.02, 1.02))
    axes.set_ylim(bottom=0)
    chart.legend(loc="outside upper left", ncols=5, fontsize=8, frameon=False, handlelength=1.2, columnspacing=1.2)
    return chart
