"""How the clients learned, round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from pplr.apps.reports.charts import MOST_LINES, as_chart, lines
from pplr.apps.reports.elements import (
    MISSING,
    Cell,
    Chart,
    Gallery,
    Paragraph,
    Part,
    Section,
    Table,
    measured,
    said,
    seconds_cell,
)
from pplr.apps.reports.records import ClientRecord, RoundRecord, RunFiles

__all__ = ["curve", "learning_section", "means", "quantities", "series", "validation_metric"]


def series(
    rounds: Sequence[RoundRecord], clients: Sequence[str], what: Callable[[ClientRecord], float | int | None]
) -> dict[str, dict[int, float]]:
    """Gather one figure of each client by server round; rounds and clients without it are left out."""
    told: dict[str, dict[int, float]] = {}
    for name in clients:
        own = {one.server_round: what(one.clients[name]) for one in rounds if name in one.clients}
        known = {number: float(value) for number, value in own.items() if value is not None}
        if known:
            told[name] = known
    return told


def validation_metric(files: RunFiles) -> str:
    """Name what clients chose their best round by."""
    wanted = files.config.evaluation.validation_metric
    names = dict.fromkeys(name for one in files.rounds for own in one.clients.values() for name in own.validation)
    return wanted if wanted in names or not names else next(iter(names))


def learning_section(files: RunFiles) -> Section:
    """Say how training went."""
    title = "How the clients learned"
    if not files.rounds:
        return Section("learning", title, [Paragraph(("No server round is finished yet.",))])
    metric = validation_metric(files)
    drawn = [(ylabel, series(files.rounds, files.clients, what)) for ylabel, what in quantities(metric)]
    charts = [curve(found, ylabel) for ylabel, found in drawn if found]
    parts: list[Part] = [Gallery(charts, broad=True)] if charts else []
    for ylabel, found in drawn:
        if not found:
            why = ": in training under differential privacy clients tell no loss" if _is_dp(files) else ""
            parts.append(
                Paragraph((f"{ylabel.partition(' (')[0].capitalize()} was ", Cell(MISSING), f"{why}."), "note")
            )
    parts.append(_last_round(files, metric))
    return Section("learning", title, parts)


def _is_dp(files: RunFiles) -> bool:
    return files.config.privacy.dp.is_on


def quantities(metric: str) -> list[tuple[str, Callable[[ClientRecord], float | int | None]]]:
    """Say what is drawn of a client by server round: the axis of each with its unit, and where the figure is."""
    validation = f"validation {metric} ({'nats' if metric == 'loss' else '0 to 1'})"
    return [
        ("training loss (nats)", lambda own: own.loss),
        (validation, lambda own: own.validation.get(metric)),
    ]


def means(told: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Average over the clients that tell a figure, each counting alike, by server round."""
    rounds = sorted({number for own in told.values() for number in own})
    return {number: fmean(own[number] for own in told.values() if number in own) for number in rounds}


def curve(
    found: Mapping[str, Mapping[int, float]],
    ylabel: str,
    run: str = "",
    limits: tuple[float, float] | None = None,
    of: str = "client",
) -> Chart:
    """Draw a figure by server round.

    Args:
        found: By client or run, then by server round.
        ylabel: What it is, with its unit.
        run: Whose it is, where a page shows several runs.
        limits: Of the axis, where several charts share it.
        of: What a line stands for.
    """
    what, whose = ylabel.partition(" (")[0], f" of {said(run)}" if run else ""
    ends = []
    for name, own in list(found.items())[:MOST_LINES]:
        numbers = list(own)
        ends.append(f"{of} {said(name)} from {own[numbers[0]]:.4f} to {own[numbers[-1]]:.4f}")
    caption = f"{said(run)}: {what}" if run else what.capitalize()
    caption += f" of each {of} by server round."
    drawn = lines(found, ylabel, title=run, limits=limits)
    return as_chart(drawn, f"Lines of {what} by server round{whose}: {', '.join(ends)}.", caption)


def _last_round(files: RunFiles, metric: str) -> Table:
    last = files.rounds[-1]
    rows = [
        (
            said(name),
            measured(own.samples),
            measured(own.loss),
            measured(own.loss_share),
            measured(own.heating_weight),
            measured(own.validation.get(metric)),
            seconds_cell(own.seconds),
        )
        for name, own in last.clients.items()
    ]
    columns = ("client", "samples", "loss", "loss share", "heating weight", f"validation {said(metric)}", "training")
    return Table(f"Server round {last.server_round}, the last; all are in rounds.jsonl", columns, rows)
