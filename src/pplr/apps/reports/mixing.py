"""Who learned from whom: heating weights, mixtures and similarities by server round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log10
from typing import Final

from pplr.apps.reports.charts import as_chart, matrix
from pplr.apps.reports.elements import MISSING, Cell, Chart, Gallery, Paragraph, Part, Section, Table, measured, said
from pplr.apps.reports.learning import curve, series
from pplr.apps.reports.records import RoundRecord, RunFiles

__all__ = [
    "HEATING",
    "MIXTURE",
    "MOST_DRAWN",
    "chosen_rounds",
    "mixed_matrix",
    "mixing_section",
    "mixtures",
    "similarities",
]

HEATING: Final = "heating weight (0 to 1)"
MIXTURE: Final = (
    "After local training each client's adapter becomes a mixture of the clients' adapters. A row of the squares says "
    "of whose adapters its own was made; the row adds up to 1. The heating weight, from 0 to 1, says how far a client "
    "opens to the others: one whose loss is still high stays with itself."
)
MOST_DRAWN: Final = 40
"""Most clients of which every pair is drawn."""
_MOST_ROUNDS: Final = 12
"""Most server rounds whose squares are drawn."""


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
    parts: list[Part] = [Paragraph((MIXTURE,))]
    if heating:
        parts.append(Gallery([curve(heating, HEATING)], broad=True))
    most = max(len(one.mixed) for one in mixed)
    chosen = (choose or chosen_rounds)(mixed)
    if most <= MOST_DRAWN:
        told = [("", one) for one in chosen]
        parts += _which(chosen, mixed)
        parts += [Gallery(charts) for charts in (mixtures(told), similarities(told)) if charts]
    if not heating:
        parts.append(Paragraph((f"The method {said(files.config.federation.method)} has no heating weight.",), "note"))
    if most > MOST_DRAWN:
        why = f"With {most} clients the pairs are not drawn; rounds.jsonl names those from whom each took most."
        parts.append(Paragraph((why,), "note"))
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


def chosen_rounds(rounds: Sequence[RoundRecord], most: int = _MOST_ROUNDS) -> list[RoundRecord]:
    """Take all where they are few, otherwise ``most`` at even distances, the first and the last among them."""
    if len(rounds) <= most:
        return list(rounds)
    step = (len(rounds) - 1) / (most - 1)
    return [rounds[round(place * step)] for place in range(most)]


def mixed_matrix(record: RoundRecord) -> list[list[float | None]]:
    """Lay out of whose adapters each client's was made: a row for each client that took part."""
    return [[record.clients[i].mixed_from.get(j) for j in record.mixed] for i in record.mixed]


def mixtures(told: Sequence[tuple[str, RoundRecord]]) -> list[Chart]:
    """Draw of whose adapters each client's was made, on one scale.

    Args:
        told: Server rounds that mixed, each with the name of its run; empty where a page shows one run.
    """
    squares = [mixed_matrix(one) for _, one in told]
    top = max(value for square in squares for row in square for value in row if value is not None)
    charts = []
    for (run, record), square in zip(told, squares, strict=True):
        keeps = ", ".join(
            f"client {said(name)} {row[place] or 0:.2f}"
            for place, (name, row) in enumerate(zip(record.mixed, square, strict=True))
        )
        when, title = f"server round {record.server_round}{_whose(run)}", _titled(run, "mixture", record)
        charts.append(
            as_chart(
                matrix(square, record.mixed, title, (0.0, top), 2),
                f"Mixing weights of {when}. Of its own adapter each keeps: {keeps}.",
                f"Mixture after {when}: share of each client's adapter, 0 to 1.",
            )
        )
    return charts


def similarities(told: Sequence[tuple[str, RoundRecord]]) -> list[Chart]:
    """Draw how alike the clients' adapters were, on one scale; nothing where that is not recorded.

    Args:
        told: Server rounds that mixed, each with the name of its run; empty where a page shows one run.
    """
    squares = [
        (run, one, _apart(one.similarity)) for run, one in told if one.similarity is not None and len(one.mixed) > 1
    ]
    known = [value for *_, square in squares for row in square for value in row if value is not None]
    if not known:
        return []
    low, high = min(known), max(known)
    clients = max(len(one.mixed) for _, one, _ in squares)
    digits = min(6 if clients <= 4 else 4 if clients <= 5 else 3, _digits(high - low))
    charts = []
    for run, record, square in squares:
        own = [value for row in square for value in row if value is not None]
        bounds = f"{min(own):.6f} to {max(own):.6f}" if own else MISSING
        when, title = f"server round {record.server_round}{_whose(run)}", _titled(run, "similarity", record)
        charts.append(
            as_chart(
                matrix(square, record.mixed, title, (low, high), digits),
                f"Similarity of the clients' adapters in {when}: {bounds}.",
                f"Similarity of adapters in {when}: {bounds} between different clients.",
            )
        )
    return charts


def _whose(run: str) -> str:
    return f" of {said(run)}" if run else ""


def _titled(run: str, what: str, record: RoundRecord) -> str:
    return f"round {record.server_round}, {run}" if run else f"{what}, round {record.server_round}"


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
