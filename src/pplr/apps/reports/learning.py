"""How the clients learned, round by round, and who learned from whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, log10
from typing import Final

from pplr.apps.reports.charts import MOST_LINES, as_chart, lines, matrix
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

__all__ = ["chosen_rounds", "learning_section", "mixed_matrix", "mixing_section", "series", "validation_metric"]

_MOST_DRAWN: Final = 40
"""Most clients of which every pair is drawn."""
_MOST_ROUNDS: Final = 12
"""Most server rounds whose squares are drawn."""


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
    drawn = [
        ("training loss (nats)", series(files.rounds, files.clients, lambda own: own.loss)),
        (
            f"validation {metric} ({'nats' if metric == 'loss' else '0 to 1'})",
            series(files.rounds, files.clients, lambda own: own.validation.get(metric)),
        ),
    ]
    charts = [_curve(found, ylabel) for ylabel, found in drawn if found]
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


def _curve(found: Mapping[str, Mapping[int, float]], ylabel: str) -> Chart:
    what = ylabel.partition(" (")[0]
    ends = []
    for name, own in list(found.items())[:MOST_LINES]:
        numbers = list(own)
        ends.append(f"client {said(name)} from {own[numbers[0]]:.4f} to {own[numbers[-1]]:.4f}")
    caption = f"{what.capitalize()} of each client by server round"
    return as_chart(lines(found, ylabel), f"Lines of {what} by server round: {', '.join(ends)}.", f"{caption}.")


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


def mixing_section(
    files: RunFiles, choose: Callable[[Sequence[RoundRecord]], Sequence[RoundRecord]] | None = None
) -> Section:
    """Say who learned from whom.

    Args:
        files: What the run's folder holds.
        choose: Picks the server rounds whose pairs are drawn; the first, the middle and the last when absent.
    """
    title = "Who learned from whom"
    mixed = [one for one in files.rounds if one.mixed]
    if not mixed:
        return Section("mixing", title, [Paragraph(("No adapters were mixed yet.",))])
    heating = series(files.rounds, files.clients, lambda own: own.heating_weight)
    parts: list[Part] = [
        Paragraph(
            (
                "After local training each client's adapter becomes a mixture of the clients' adapters. A row of the "
                "squares says of whose adapters its own was made; the row adds up to 1. The heating weight, from 0 to "
                "1, says how far a client opens to the others: one whose loss is still high stays with itself.",
            )
        )
    ]
    if heating:
        parts.append(Gallery([_curve(heating, "heating weight (0 to 1)")], broad=True))
    most = max(len(one.mixed) for one in mixed)
    chosen = (choose or chosen_rounds)(mixed)
    if most <= _MOST_DRAWN:
        parts += _which(chosen, mixed)
        parts += [Gallery(charts) for charts in (_mixtures(chosen), _similarities(chosen)) if charts]
    if not heating:
        parts.append(Paragraph((f"The method {said(files.config.federation.method)} has no heating weight.",), "note"))
    if most > _MOST_DRAWN:
        told = f"With {most} clients the pairs are not drawn; rounds.jsonl names those from whom each took most."
        parts.append(Paragraph((told,), "note"))
    else:
        parts.append(_own_share(chosen))
    return Section("mixing", title, parts)


def _which(chosen: Sequence[RoundRecord], mixed: Sequence[RoundRecord]) -> list[Part]:
    """Say which server rounds the squares are of, where they are not of all."""
    if len(chosen) == len(mixed):
        return []
    told = ", ".join(str(one.server_round) for one in chosen)
    which = f"server rounds {told}" if len(chosen) > 1 else f"server round {told}"
    return [Paragraph((f"The squares show {which}, of {len(mixed)} that mixed; all are in rounds.jsonl.",), "note")]


def chosen_rounds(rounds: Sequence[RoundRecord]) -> list[RoundRecord]:
    """Take all where they are few, otherwise twelve at even distances, the first and the last among them."""
    if len(rounds) <= _MOST_ROUNDS:
        return list(rounds)
    step = (len(rounds) - 1) / (_MOST_ROUNDS - 1)
    return [rounds[round(place * step)] for place in range(_MOST_ROUNDS)]


def mixed_matrix(record: RoundRecord) -> list[list[float | None]]:
    """Lay out of whose adapters each client's was made: a row for each client that took part."""
    return [[record.clients[i].mixed_from.get(j) for j in record.mixed] for i in record.mixed]


def _mixtures(rounds: Sequence[RoundRecord]) -> list[Chart]:
    squares = [mixed_matrix(one) for one in rounds]
    top = max(value for square in squares for row in square for value in row if value is not None)
    charts = []
    for record, square in zip(rounds, squares, strict=True):
        keeps = ", ".join(
            f"client {said(name)} {row[place] or 0:.2f}"
            for place, (name, row) in enumerate(zip(record.mixed, square, strict=True))
        )
        charts.append(
            as_chart(
                matrix(square, record.mixed, f"mixture, round {record.server_round}", (0.0, top), 2),
                f"Mixing weights of server round {record.server_round}. Of its own adapter each keeps: {keeps}.",
                f"Mixture after server round {record.server_round}: share of each client's adapter, 0 to 1.",
            )
        )
    return charts


def _similarities(rounds: Sequence[RoundRecord]) -> list[Chart]:
    told = [(one, _apart(one.similarity)) for one in rounds if one.similarity is not None and len(one.mixed) > 1]
    known = [value for _, square in told for row in square for value in row if value is not None]
    if not known:
        return []
    low, high = min(known), max(known)
    digits = min(6 if max(len(one.mixed) for one, _ in told) <= 4 else 3, _digits(high - low))
    charts = []
    for record, square in told:
        own = [value for row in square for value in row if value is not None]
        bounds = f"{min(own):.6f} to {max(own):.6f}" if own else MISSING
        charts.append(
            as_chart(
                matrix(square, record.mixed, f"similarity, round {record.server_round}", (low, high), digits),
                f"Similarity of the clients' adapters in server round {record.server_round}: {bounds}.",
                f"Similarity of adapters in server round {record.server_round}: {bounds} between different clients.",
            )
        )
    return charts


def _apart(similarity: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Leave out the diagonal, which is 1 by definition."""
    return [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(similarity)]


def _digits(spread: float) -> int:
    """Choose how many digits tell apart what is so far apart."""
    return 2 if spread <= 0 else max(2, ceil(-log10(spread)) + 1)


def _own_share(rounds: Sequence[RoundRecord]) -> Table:
    names = list(dict.fromkeys(name for one in rounds for name in one.mixed))
    rows: list[Sequence[Cell | str]] = []
    for name in names:
        cells = []
        for one in rounds:
            own = one.clients[name].mixed_from if name in one.mixed else {}
            cells.append(measured(own.get(name)))
        rows.append((said(name), *cells))
    columns = ("client", *(f"round {one.server_round}" for one in rounds))
    return Table("How much of its own adapter each client keeps in the mixture, 0 to 1", columns, rows)
