"""Several runs side by side: how their clients learned, who learned from whom, and what servers could read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pplr.apps.auditing import SHOWN
from pplr.apps.reports.charts import MOST_LINES, as_chart, intervals
from pplr.apps.reports.elements import Cell, Chart, Gallery, Paragraph, Part, Section, Table, Text, measured, said
from pplr.apps.reports.leakage import elsewhere, interval_cell, own_setting, spent, strongest_attack, where
from pplr.apps.reports.learning import curve, means, quantities, series, validation_metric
from pplr.apps.reports.mixing import HEATING, MIXTURE, MOST_DRAWN, chosen_rounds, mixtures, similarities
from pplr.apps.reports.records import ClientRecord, IntervalRecord, RoundRecord, RunFiles

__all__ = ["leakage_beside", "learning_beside", "mixing_beside"]

_MOST_ROUNDS: Final = 3
"""Server rounds of each run whose squares are drawn."""

Runs = Sequence[tuple[str, RunFiles]]
"""Runs with the names that the page calls them by."""


def learning_beside(runs: Runs) -> Section:
    """Draw the learning curves: the means of all runs in one chart, then each run's clients, on one scale."""
    metrics = list(dict.fromkeys(validation_metric(files) for _, files in runs if files.rounds))
    asked = {ylabel: what for metric in metrics for ylabel, what in quantities(metric)}
    told = {ylabel: found for ylabel, what in asked.items() if (found := _told(runs, what))}
    together = [
        curve({name: means(own) for name, own in found.items()}, f"mean {ylabel}", of="run")
        for ylabel, found in told.items()
        if 1 < len(found) <= MOST_LINES
    ]
    parts: list[Part] = [Gallery(together, broad=True)] if together else []
    parts += [Gallery(_each(found, ylabel), broad=True) for ylabel, found in told.items()]
    if not parts:
        parts = [Paragraph(("No run recorded a loss or a validation figure by server round.",), "note")]
    elif together:
        note = "A mean counts each client alike. Below the means, all charts of one figure have one scale."
        parts.insert(1, Paragraph((note,), "note"))
    return Section("learning", "How the clients learned", parts)


def _told(runs: Runs, what: Callable[[ClientRecord], float | int | None]) -> dict[str, dict[str, dict[int, float]]]:
    """Gather one figure by run, client and server round; runs without it are left out."""
    told = {name: series(files.rounds, files.clients, what) for name, files in runs}
    return {name: found for name, found in told.items() if found}


def _each(told: Mapping[str, Mapping[str, Mapping[int, float]]], ylabel: str) -> list[Chart]:
    values = [value for found in told.values() for own in found.values() for value in own.values()]
    limits = (min(values), max(values))
    return [curve(found, ylabel, name, limits) for name, found in told.items()]


def mixing_beside(runs: Runs) -> Section:
    """Draw heating weights, mixtures and similarities of the runs that mixed, on one scale each."""
    title = "Who learned from whom"
    mixed = {name: [one for one in files.rounds if one.mixed] for name, files in runs}
    chosen = [(name, one) for name, rounds in mixed.items() for one in chosen_rounds(rounds, _MOST_ROUNDS)]
    if not chosen:
        return Section("mixing", title, [Paragraph(("No run mixed adapters.",))])
    parts: list[Part] = [Paragraph((MIXTURE,))]
    if heating := _told(runs, lambda own: own.heating_weight):
        parts.append(Gallery(_each(heating, HEATING), broad=True))
    without = [said(name) for name, _ in runs if name not in heating]
    if without:
        parts.append(Paragraph((f"Without heating weights: {', '.join(without)}.",), "note"))
    few = [(name, one) for name, one in chosen if 1 < len(one.mixed) <= MOST_DRAWN]
    if any(len(rounds) > _MOST_ROUNDS for rounds in mixed.values()):
        note = "Of each run the first, the middle and the last server round are drawn; its own report has more."
        parts.append(Paragraph((note,), "note"))
    if few:
        parts += [Gallery(charts) for charts in (mixtures(few), similarities(few)) if charts]
    last = [(name, rounds[-1]) for name, rounds in mixed.items() if rounds]
    return Section("mixing", title, [*parts, _own_share(last)])


def _own_share(last: Sequence[tuple[str, RoundRecord]]) -> Table:
    clients = list(dict.fromkeys(client for _, one in last for client in one.mixed))
    rows: list[Sequence[Cell | str]] = []
    for client in clients:
        kept = (measured(one.clients[client].mixed_from.get(client)) if client in one.mixed else "" for _, one in last)
        rows.append((said(client), *kept))
    caption = "How much of its own adapter each client keeps in the last mixture, 0 to 1"
    columns = ("client", *(f"{said(name)}, round {one.server_round}" for name, one in last))
    return Table(caption, columns, rows)


def leakage_beside(runs: Runs) -> Section:
    """Say what the strongest attacks read in each run, beside a guess without states, and what ε is spent."""
    rows: list[Sequence[Cell | str]] = []
    drawn: list[tuple[str, float, float, float]] = []
    guesses: list[IntervalRecord] = []
    notes: list[Text] = []
    for name, files in runs:
        audit, spending = files.audit, [own for own in spent(files).values() if own is not None]
        epsilon = measured(max(spending) if spending else None, 3) if files.config.privacy.dp.is_on else "no bound"
        if audit is None:
            setting = "not cut" if files.config.cut is None else "not audited"
            rows.append((said(name), setting, *(interval_cell(None) for _ in (*SHOWN, "guess")), epsilon))
            continue
        own = own_setting(audit)
        found = [strongest_attack(own, metric) for metric in SHOWN]
        guess = audit.baseline.get("item_f1")
        cells = [interval_cell(one[1] if one else None) for one in found]
        rows.append((said(name), where(own, audit), *cells, interval_cell(guess), epsilon))
        if elsewhere(audit):
            notes.append((f"{said(name)} was audited at {where(own, audit)}, which is not how it was cut.",))
        if (read := found[SHOWN.index("item_f1")]) is not None:
            drawn.append((name, read[1].mean, read[1].low, read[1].high))
            guesses += [guess] if guess else []
    columns = ("run", "audited at", *SHOWN, "a guess, item_f1", "largest ε of a client")
    caption = "What the strongest attack on the server's side read in each run, and what differential privacy bounds"
    parts: list[Part] = [Table(caption, columns, rows, texts=("audited at",))]
    parts += [Paragraph(note, "notice") for note in notes]
    if drawn:
        parts.append(_leakage_chart(drawn, guesses))
    told = (
        "An attack that finds little does not show that others would. Where nobody measured it, count histories as "
        "known to whoever runs the server. The adapters that clients exchange are bounded by ε alone."
    )
    return Section("leakage", "What the server could read", [*parts, Paragraph((told,), "note")])


def _leakage_chart(drawn: Sequence[tuple[str, float, float, float]], guesses: Sequence[IntervalRecord]) -> Chart:
    band = None
    if guesses:
        low, high = min(own.low for own in guesses), max(own.high for own in guesses)
        band = ("popularity, no states", low, high)
    told = "; ".join(f"{said(name)} {mean:.2f}" for name, mean, *_ in drawn)
    return as_chart(
        intervals(drawn, band, "item_f1 of the strongest attack (0 to 1)", limits=(-0.03, 1.03)),
        f"Means with intervals of item_f1, the strongest attack of each run: {told}.",
        "Items of the history that the strongest attack read in each run. Right is worse for the users.",
        wide=True,
    )
