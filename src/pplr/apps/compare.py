"""Runs side by side: their figures, and whether a difference is more than chance, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pplr.apps.tables import Table, figure
from pplr.runtimes.comparing import Difference, chosen_metrics, finished_metrics, metric_names

if TYPE_CHECKING:
    from pplr.runtimes.run import Run

__all__ = ["difference_table", "run_table", "spread_table"]


def run_table(runs: Sequence[Run]) -> Table:
    """Lay the runs out: a row for each, with its method and its overall metrics.

    Raises:
        RunError: A run is not finished.
    """
    contents = [finished_metrics(run) for run in runs]
    names = list(dict.fromkeys(name for content in contents for name in metric_names(content)))
    rows: list[list[str]] = []
    for run, content in zip(runs, contents, strict=True):
        overall = content.get("overall") or {}
        row = [str(run.folder), str(content.get("method") or "-")]
        rows.append(row + [figure(overall.get(name)) for name in names])
    return Table(("run", "method", *names), rows, texts=("run", "method"))


def spread_table(runs: Sequence[Run], metrics: Sequence[str] = ()) -> Table:
    """Lay out how far each run's clients differ: a row for each run and metric.

    Args:
        runs: At least one, finished.
        metrics: As for :func:`compare`.

    Raises:
        RunError: A run is not finished.
        ConfigError: A metric was not measured by the first run.
    """
    chosen = chosen_metrics(runs[0], metrics)
    rows: list[tuple[str, ...]] = []
    for metric in chosen:
        for run in runs:
            spread = (finished_metrics(run).get("spread") or {}).get(metric) or {}
            rows.append(
                (str(run.folder), metric, *(figure(spread.get(key)) for key in ("worst", "best", "gap", "std")))
            )
    return Table(("run", "metric", "worst client", "best client", "gap", "std"), rows, texts=("run", "metric"))


def difference_table(differences: Sequence[Difference], first: Run) -> Table:
    """Lay differences out, a row for each run and metric, and say which can be called one."""
    rows = [
        (
            own.run,
            own.metric,
            figure(own.users),
            f"{own.difference:+.4f}",
            f"{own.low:+.4f} to {own.high:+.4f}",
            f"{own.p:.4f}",
            "yes" if own.is_one else "no",
        )
        for own in differences
    ]
    columns = (f"against {first.folder}", "metric", "users", "difference", "95 % interval", "p", "more than chance")
    return Table(columns, rows, texts=(columns[0], "metric", columns[-1]))
