"""What recommendations are worth: for all, for each client, and beside the floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pplr.apps.reports.charts import as_chart, bars
from pplr.apps.reports.elements import MISSING, Cell, Chart, Code, Paragraph, Part, Section, Table, measured, said
from pplr.apps.reports.records import MetricsRecord, RunFiles
from pplr.errors import RunError
from pplr.recommend.evaluation import Evaluation
from pplr.runtimes.comparing import Difference, difference_of, metric_names

__all__ = ["DIFFERENCES", "bootstrap_note", "difference_rows", "headline_metric", "part_of", "quality_section"]

DIFFERENCES = ("metric", "users", "difference", "95 % interval", "p", "more than chance")
"""Headings of what :func:`difference_rows` lays out, after that of its first column."""


def headline_metric(metrics: MetricsRecord) -> str | None:
    """Choose the figure that stands for the rest: ndcg@10, or the first ndcg, or whatever is first."""
    names = metric_names({"overall": metrics.overall, "clients": metrics.clients})
    by_liking = sorted(names, key=lambda name: (name != "ndcg@10", not name.startswith("ndcg@")))
    return by_liking[0] if by_liking else None


def part_of(files: RunFiles, part: str = "test") -> Evaluation | None:
    """Read each user's figures, where the run keeps them."""
    if not (files.folder / "evaluation.json").exists():
        return None
    try:
        return files.run.evaluation(part)
    except RunError as error:
        if "has no evaluation" in error.message:
            return None
        raise


def quality_section(files: RunFiles, *, samples: int, seed: int) -> Section:
    """Say what the recommendations are worth.

    Args:
        files: Of the run.
        samples: Bootstrap samples of the difference to the floors.
        seed: Of the bootstrap.
    """
    metrics, title = files.metrics, "What the recommendations are worth"
    if metrics is None or (metric := headline_metric(metrics)) is None:
        told = Paragraph(("Test figures are ", Cell(MISSING), ": the run has not been tested to its end."))
        return Section("quality", title, [told])
    parts: list[Part] = [*_by_client_chart(metrics, metric), _ranking_table(metrics)]
    if metrics.spread:
        parts.append(_spread_table(metrics))
    if floors := _floors_by_client(files, metrics, metric):
        parts.append(floors)
    parts += _against_floors(files, metrics, metric, samples, seed)
    return Section("quality", title, parts)


def _by_client_chart(metrics: MetricsRecord, metric: str) -> list[Chart]:
    values = {name: own[metric] for name, own in metrics.clients.items() if own.get(metric) is not None}
    if not values:
        return []
    every = {"all users": metrics.overall.get(metric)}
    every |= {name: own.get(metric) for name, own in metrics.floors.items()}
    references = {name: value for name, value in every.items() if value is not None}
    told = [f"client {said(name)} {value:.4f}" for name, value in values.items() if value is not None][:20]
    told += [f"{said(name)} {value:.4f}" for name, value in references.items()]
    figure = bars({name: float(value or 0.0) for name, value in values.items()}, references, f"{metric} (0 to 1)")
    return [
        as_chart(
            figure,
            f"Bars of {metric}: {', '.join(told)}.",
            f"{metric} of each client's test users; lines are the mean over all users and the floors.",
            wide=True,
        )
    ]


def _ranking_table(metrics: MetricsRecord) -> Table:
    names = metric_names({"overall": metrics.overall, "clients": metrics.clients})
    counted = [own.get("users") for own in metrics.clients.values()]
    known = [count for count in counted if count is not None]
    total = sum(known) if known and len(known) == len(counted) else None
    rows: list[Sequence[Cell | str]] = [
        (f"client {said(name)}", measured(own.get("users")), *(measured(own.get(one)) for one in names))
        for name, own in metrics.clients.items()
    ]
    ruled = [len(rows)]
    rows.append(("all users", measured(total), *(measured(metrics.overall.get(one)) for one in names)))
    if metrics.before is not None:
        overall = metrics.before.overall
        rows.append(("before training", measured(total), *(measured(overall.get(one)) for one in names)))
    ruled.append(len(rows))
    for floor, own in metrics.floors.items():
        rows.append((f"floor: {said(floor)}", measured(total), *(measured(own.get(one)) for one in names)))
    return Table("Test figures, means over users, on the full catalog", ("", "users", *names), rows, ruled=ruled)


def _spread_table(metrics: MetricsRecord) -> Table:
    keys = ("worst", "best", "gap", "std")
    rows: list[Sequence[Cell | str]] = [
        (said(name), *(measured(own.get(key)) for key in keys)) for name, own in metrics.spread.items()
    ]
    return Table("How far clients differ", ("over clients", "worst client", "best client", "gap", "std"), rows)


def _floors_by_client(files: RunFiles, metrics: MetricsRecord, metric: str) -> Table | None:
    """Put the floors beside each client's own figure, on the client's own users."""
    found = {name: own for name in metrics.floors if (own := part_of(files, name)) is not None}
    if not found:
        return None
    by_client: Mapping[str, Mapping[str, Mapping[str, float | int | None]]] = {
        name: own.by_client() for name, own in found.items()
    }
    rows: list[Sequence[Cell | str]] = [
        (
            f"client {said(client)}",
            measured(own.get(metric)),
            *(measured(by_client[floor].get(client, {}).get(metric)) for floor in found),
        )
        for client, own in metrics.clients.items()
    ]
    columns = ("", "this run", *(f"floor: {said(floor)}" for floor in found))
    return Table(f"{metric} of each client's users beside the floors on the same users", columns, rows)


def _against_floors(files: RunFiles, metrics: MetricsRecord, metric: str, samples: int, seed: int) -> list[Part]:
    test = part_of(files)
    found = {name: own for name in metrics.floors if (own := part_of(files, name)) is not None}
    if test is None or not found:
        return []
    differences = [
        difference_of(name, test, floor, metric, samples=samples, seed=seed) for name, floor in found.items()
    ]
    caption = "This run less each floor, over the same users"
    table = Table(
        caption, ("this run less", *DIFFERENCES), difference_rows(differences), texts=("metric", DIFFERENCES[-1])
    )
    return [table, bootstrap_note(samples)]


def bootstrap_note(samples: int) -> Paragraph:
    """Say how differences are judged."""
    return Paragraph(
        (
            f"Users are resampled {samples:,} times in pairs. A difference is called more than chance where its "
            "interval leaves out 0: it says how far the figure would move with other users, not with other seeds, "
            "and it is not corrected for the number of rows. The same in the terminal: ",
            Code("pplr compare"),
            ".",
        ),
        "note",
    )


def difference_rows(differences: Sequence[Difference]) -> list[Sequence[Cell | str]]:
    """Lay differences out, and say which can be called one."""
    return [
        (
            said(own.run),
            said(own.metric),
            measured(own.users),
            Cell(f"{own.difference:+.4f}", own.difference),
            f"{own.low:+.4f} to {own.high:+.4f}",
            measured(own.p),
            "yes" if own.is_one else "no",
        )
        for own in differences
    ]
