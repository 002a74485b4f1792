"""Charts that can be read without colour: SVG with the same bytes each time, and nothing in it from elsewhere."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from math import isnan
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import median

from pplr.apps.reports.elements import Chart, said

__all__ = ["MOST_LINES", "as_chart", "bars", "intervals", "lines", "matrix"]

MOST_LINES: Final = 8
"""Clients that are told apart in one chart of lines; more become a band with their median."""
_MOST_NUMBERS: Final = 10
_WIDTH: Final = 4.7
_CHARACTERS: Final = 72
"""About as many as a line of a legend holds."""
_INKS = ("#000000", "#0b5394", "#a33b00", "#44652a", "#5b3a8c", "#666666", "#8a1538", "#00706b")
_DASHES: Final[tuple[Any, ...]] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 3)), (0, (1, 3)))
_MARKS: Final = "os^Dv*XP"
_STYLE: Final[Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "pplr",
    "text.parse_math": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


_POINTS = 72
"""In an inch."""


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts draw it
        yield


def as_chart(figure: Figure, description: str, caption: str, *, wide: bool = False) -> Chart:
    """Put a figure on a page.

    Args:
        figure: Drawn by this module.
        description: What it shows, for those who do not see it.
        caption: What it shows, for all.
        wide: Whether it takes the whole width.
    """
    file = io.StringIO()
    with _styled():
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
    source = "data:image/svg+xml;base64," + base64.b64encode(drawn.encode()).decode()
    width, height = (round(inches * _POINTS) for inches in figure.get_size_inches())
    return Chart(source, description, caption, wide=wide, size=(width, height))


def lines(
    series: Mapping[str, Mapping[int, float]],
    ylabel: str,
    *,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw how something went over the server rounds.

    Args:
        series: For each client its values by server round, from 1.
        ylabel: What is drawn, with its unit.
        title: Above the lines.
        limits: Of the upward axis; as far as the lines go when absent.
    """
    with _styled():
        rows = -(-min(len(series), MOST_LINES) // _columns(series))
        figure, axes = _axes(2.4 + 0.17 * rows + (0.22 if title else 0))
        if len(series) > MOST_LINES:
            _band(axes, series)
        else:
            styles = zip(cycle(_INKS), cycle(_DASHES), cycle(_MARKS), strict=False)
            for (name, own), (ink, dash, mark) in zip(series.items(), styles, strict=False):
                axes.plot(list(own), list(own.values()), color=ink, linestyle=dash, marker=mark, label=_short(name))
        axes.set(xlabel="server round", ylabel=ylabel if len(ylabel) <= 26 else ylabel.replace(" (", "\n("))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if title:
            axes.set_title(_short(title, 40), loc="left")
        if limits is not None and limits[1] > limits[0]:
            margin = 0.05 * (limits[1] - limits[0])
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
        _legend(figure, axes)
    return figure


def _band(axes: Axes, series: Mapping[str, Mapping[int, float]]) -> None:
    rounds = sorted({number for own in series.values() for number in own})
    values = [[own[number] for own in series.values() if number in own] for number in rounds]
    axes.fill_between(
        rounds, [min(own) for own in values], [max(own) for own in values], color="0.85", label="lowest to highest"
    )
    axes.plot(rounds, [median(own) for own in values], "o-", color="black", label=f"median of {len(series)} clients")


def bars(values: Mapping[str, float], references: Mapping[str, float], xlabel: str) -> Figure:
    """Draw one figure for each client, with what it is to be compared with as lines through all.

    Args:
        values: By client, in the order they are shown from the top.
        references: Such as the mean and the floors.
        xlabel: What is drawn, with its unit.
    """
    with _styled():
        figure, axes = _axes(1.2 + 0.26 * max(3, min(len(values), 60)))
        names = list(values)
        axes.barh(range(len(names)), list(values.values()), color="0.82", edgecolor="0.35", hatch="//", height=0.7)
        for (name, value), dash in zip(references.items(), cycle(_DASHES), strict=False):
            axes.axvline(value, color="black", linestyle=dash, label=f"{_short(name)} {value:.4f}")
        shown = range(len(names)) if len(names) <= 60 else range(0, len(names), len(names) // 30)
        axes.set_yticks(list(shown), [_short(names[place]) for place in shown])
        axes.set(xlabel=xlabel, ylabel="client")
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        if references:
            _legend(figure, axes)
    return figure


def matrix(
    values: Sequence[Sequence[float | None]], names: Sequence[str], title: str, scale: tuple[float, float], digits: int
) -> Figure:
    """Draw a square of clients, darker for more, with the numbers where there is room.

    Args:
        values: A row for each client.
        names: Of the clients.
        title: Above the square.
        scale: What is white and what is black.
        digits: After the point of each number.
    """
    low, high = scale if scale[1] > scale[0] else (scale[0] - 0.5, scale[1] + 0.5)
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    with _styled():
        figure = Figure(figsize=(3.3, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.patch.set(facecolor="white", edgecolor="0.75", hatch="////")  # shows where there is no number
        picture = axes.imshow(numbers, cmap="Greys", vmin=low, vmax=high + 0.35 * (high - low), aspect="equal")
        if len(names) <= _MOST_NUMBERS:
            for i, row in enumerate(numbers):
                for j, value in enumerate(row):
                    if isnan(value):
                        continue
                    dark = (value - low) / (high - low) > 0.75
                    size = 8 if len(names) <= 5 else 6
                    told = f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"
                    axes.text(j, i, told, ha="center", va="center", fontsize=size, color="white" if dark else "black")
        shown = range(0, len(names), 1 if len(names) <= 20 else len(names) // 10)
        labels = [_short(names[place], 10) for place in shown]
        axes.set_xticks(list(shown), labels, rotation=0 if max(map(len, labels)) <= 2 else 60)
        axes.set_yticks(list(shown), labels)
        axes.set(title=_short(title, 34), xlabel="from client", ylabel="client")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if len(names) > _MOST_NUMBERS:
            figure.colorbar(picture, ax=axes, shrink=0.8)
    return figure


def intervals(
    rows: Sequence[tuple[str, float, float, float]],
    reference: tuple[str, float, float] | None,
    xlabel: str,
    limits: tuple[float, float] | None = None,
    *,
    zero: bool = False,
) -> Figure:
    """Draw means with their intervals, one beneath the other.

    Args:
        rows: Name, mean, low and high, from the top.
        reference: Name, low and high of what they are compared with, as a grey band.
        xlabel: What is drawn, with its unit.
        limits: Of the axis.
        zero: Whether a line marks 0.
    """
    with _styled():
        figure, axes = _axes(1.15 + 0.26 * max(2, len(rows)))
        if reference is not None:
            name, low, high = reference
            axes.axvspan(low, high, facecolor="0.88", edgecolor="0.6", hatch="xxx", label=_short(name, 40))
        for place, (_, mean, low, high) in enumerate(rows):
            reach = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            axes.errorbar(mean, place, xerr=reach, fmt="o", color="black", capsize=3)
        axes.set_yticks(range(len(rows)), [_short(name, 34) for name, *_ in rows])
        axes.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
        if limits is not None:
            axes.set_xlim(*limits)
        if zero:
            axes.axvline(0.0, color="0.4", linestyle="--", linewidth=1)
        axes.grid(visible=False, axis="y")
        if reference is not None:
            figure.legend(loc="outside upper left")
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes) -> None:
    """Name the lines above the axes, as many beside each other as fit."""
    columns = _columns(axes.get_legend_handles_labels()[1])
    figure.legend(loc="outside upper left", ncols=columns, handlelength=3.2)


def _columns(names: Iterable[str]) -> int:
    """Choose how many names stand beside each other, ten characters being taken by each line and what parts them."""
    longest = max((len(_short(name)) for name in names), default=0)
    return min(3, max(1, _CHARACTERS // (longest + 10)))


def _short(name: str, longest: int = 22) -> str:
    text = said(name)
    return text if len(text) <= longest else text[: longest - 1] + "…"
