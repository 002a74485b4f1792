"""Runs beside each other: their figures, their clients, and which differences are more than chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pplr.apps.reports.beside import leakage_beside, learning_beside, mixing_beside
from pplr.apps.reports.charts import as_chart, intervals
from pplr.apps.reports.elements import (
    MISSING,
    Cell,
    Chart,
    Code,
    Page,
    Paragraph,
    Part,
    Section,
    Table,
    Text,
    between,
    bytes_cell,
    count_cell,
    measured,
    said,
    seconds_cell,
)
from pplr.apps.reports.leakage import elsewhere, own_setting, strongest_attack
from pplr.apps.reports.quality import DIFFERENCES, bootstrap_note, difference_rows, part_of
from pplr.apps.reports.records import MetricsRecord, RunFiles
from pplr.errors import RunError
from pplr.recommend.evaluation import Evaluation
from pplr.runtimes.comparing import (
    Difference,
    check_same_holdout,
    chosen_metrics,
    compare,
    difference_of,
    finished_metrics,
    metric_names,
)

__all__ = ["comparison_page", "comparison_parts", "run_names"]


def run_names(runs: Sequence[RunFiles]) -> list[str]:
    """Name runs by their folders; by whole paths where two would be called the same."""
    names = [one.name for one in runs]
    return [str(one.folder) if names.count(name) > 1 else name for one, name in zip(runs, names, strict=True)]


def comparison_page(runs: Sequence[RunFiles], metrics: Sequence[str], *, samples: int, seed: int, made_by: str) -> Page:
    """Compare every run with the first.

    Args:
        runs: At least one, finished.
        metrics: Which to compare; recall and ndcg at the first run's smallest cutoff when empty.
        samples: Bootstrap samples.
        seed: Of the bootstrap.
        made_by: Program and version.

    Raises:
        RunError: A run is not finished, was tested on another holdout, or lacks each user's figures.
        ConfigError: A metric was not measured.
    """
    names, first = run_names(runs), runs[0]
    named = list(zip(names, runs, strict=True))
    chosen = chosen_metrics(first.run, metrics)
    differences = _differences(runs, names, chosen, samples, seed)
    sections = [
        Section("runs", "The runs", [_runs_table(runs, names), _cost_table(runs, names)]),
        Section("differences", "Differences", _difference_parts(differences, names[0], samples)),
        Section("clients", "Client by client", _client_parts(runs, names, chosen[-1], samples, seed)),
        learning_beside(named),
        mixing_beside(named),
        leakage_beside(named),
    ]
    if len(runs) < 2:
        sections = sections[:1] + sections[2:]
    return Page(
        title=f"Comparison: {', '.join(said(name) for name in names)}",
        summary=_summary(runs, names, chosen[-1], differences),
        sections=sections,
        made_by=made_by,
    )


def comparison_parts(first: RunFiles, others: Sequence[RunFiles], *, samples: int, seed: int) -> list[Part]:
    """Put other runs of the same experiment beside a run, for its report.

    Raises:
        RunError: A run is not finished, was tested on another holdout, or lacks each user's figures.
    """
    runs = [first, *others]
    names, chosen = run_names(runs), chosen_metrics(first.run, ())
    differences = _differences(runs, names, chosen, samples, seed)
    parts: list[Part] = [_runs_table(runs, names), *_difference_parts(differences, names[0], samples)]
    return parts + _client_parts(runs, names, chosen[-1], samples, seed)


def _differences(
    runs: Sequence[RunFiles], names: Sequence[str], chosen: Sequence[str], samples: int, seed: int
) -> list[Difference]:
    found = compare([one.run for one in runs], chosen, samples=samples, seed=seed)
    shown = {str(one.run.folder): name for one, name in zip(runs, names, strict=True)}
    return [Difference(shown[own.run], *list(vars(own).values())[1:]) for own in found]


def _told(files: RunFiles) -> MetricsRecord:
    finished_metrics(files.run)  # says what to do about a run that is not finished
    if files.metrics is None:
        raise RunError(f"{files.folder} was finished while it was read", cure="Run the command again.")
    return files.metrics


def _runs_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    told = [_told(one) for one in runs]
    metrics = list(dict.fromkeys(name for own in told for name in metric_names({"overall": own.overall})))
    rows: list[Sequence[Cell | str]] = [
        (
            said(name),
            Code(said(own.method)).text,
            measured(one.config.run.seed),
            *(measured(own.overall.get(m)) for m in metrics),
        )
        for name, one, own in zip(names, runs, told, strict=True)
    ]
    ruled = [len(rows)]
    rows += [
        (f"floor: {said(floor)}", "", "", *(measured(own.get(m)) for m in metrics))
        for floor, own in told[0].floors.items()
    ]
    columns = ("run", "method", "seed", *metrics)
    return Table("Test figures, means over all users", columns, rows, texts=("method",), ruled=ruled)


def _cost_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    rows: list[Sequence[Cell | str]] = []
    for name, one in zip(names, runs, strict=True):
        own = _told(one)
        rows.append(
            (
                said(name),
                measured(len(one.rounds)),
                bytes_cell(own.cost.client.get("stored_bytes")),
                bytes_cell(own.cost.server.get("stored_bytes")),
                bytes_cell(own.cost.wire.get("bytes_up")),
                bytes_cell(own.cost.wire.get("bytes_down")),
                seconds_cell(own.seconds.get("train")),
                count_cell(own.cost.client.get("train_flops")),
                count_cell(own.cost.server.get("train_flops")),
                _read_by_server(one),
            )
        )
    columns = (
        "run",
        "server rounds",
        "client stores",
        "server stores",
        "up",
        "down",
        "training",
        "clients' FLOPs, worked out",
        "server's FLOPs, worked out",
        "server read, item_f1",
    )
    return Table("What the runs cost, and what the server read of histories at best", columns, rows)


def _read_by_server(files: RunFiles) -> Cell:
    """Show what the strongest attack read at the run's own cut."""
    if files.audit is None or elsewhere(files.audit):
        return Cell(MISSING)
    found = strongest_attack(own_setting(files.audit), "item_f1")
    return Cell(MISSING) if found is None else between(found[1].mean, found[1].low, found[1].high)


def _difference_parts(differences: Sequence[Difference], first: str, samples: int) -> list[Part]:
    if not differences:
        return []
    head = f"less {said(first)}"
    parts: list[Part] = [
        Table(
            f"Each run less {said(first)}, over the users that both tested",
            (head, *DIFFERENCES),
            difference_rows(differences),
            texts=("metric", DIFFERENCES[-1]),
        ),
        bootstrap_note(samples),
    ]
    for metric in dict.fromkeys(own.metric for own in differences):
        rows = [(own.run, own.difference, own.low, own.high) for own in differences if own.metric == metric]
        parts.append(_difference_chart(rows, metric, f"less {said(first)}"))
    return parts


def _difference_chart(rows: Sequence[tuple[str, float, float, float]], metric: str, less: str) -> Chart:
    told = "; ".join(f"{said(name)} {mean:+.4f}, {low:+.4f} to {high:+.4f}" for name, mean, low, high in rows)
    return as_chart(
        intervals(rows, None, f"difference in {metric} (0 is no difference)", zero=True),
        f"Differences in {metric} with 95 % intervals, {less}: {told}.",
        f"Difference in {metric}, {less}, with 95 % intervals over users; the line is no difference.",
        wide=True,
    )


def _client_parts(runs: Sequence[RunFiles], names: Sequence[str], metric: str, samples: int, seed: int) -> list[Part]:
    """Put the clients of runs with one partition beside each other; say so where partitions differ."""
    told = [_told(one) for one in runs]
    clients = list(dict.fromkeys(client for own in told for client in own.clients))
    rows: list[Sequence[Cell | str]] = [
        (f"client {said(client)}", *(measured(own.clients.get(client, {}).get(metric)) for own in told))
        for client in clients
    ]
    ruled = [len(rows)]
    for key in ("worst", "best", "gap", "std"):
        rows.append((f"over clients: {key}", *(measured(own.spread.get(metric, {}).get(key)) for own in told)))
    parts: list[Part] = [Table(f"{metric} of each client's users", ("", *names), rows, ruled=ruled)]
    if not _same_partition(runs):
        note = "The runs shared users out among clients differently: a client's name stands for other users in each."
        return [*parts, Paragraph((note,), "note")]
    first = part_of(runs[0])
    found: list[Difference] = []
    for one, name in zip(runs[1:], names[1:], strict=True):
        other = part_of(one)
        if first is not None and other is not None:
            check_same_holdout(runs[0].run, one.run)
            for client in clients:
                own = _users_of(first, client)
                if len(np.intersect1d(own.users, other.users)):
                    label = f"client {client}: {name}" if len(runs) > 2 else f"client {client}"
                    found.append(difference_of(label, other, own, metric, samples=samples, seed=seed))
    if found:
        caption = f"Each client's users: {', '.join(map(said, names[1:]))} less {said(names[0])}"
        columns = (f"less {said(names[0])}", *DIFFERENCES)
        parts.append(Table(caption, columns, difference_rows(found), texts=("metric", DIFFERENCES[-1])))
    return parts


def _same_partition(runs: Sequence[RunFiles]) -> bool:
    hashes = {one.provenance.hashes.get("partition_sha256") if one.provenance else None for one in runs}
    return len(hashes) == 1 and None not in hashes


def _users_of(evaluation: Evaluation, client: str) -> Evaluation:
    own = np.array([name == client for name in evaluation.client_of], dtype=bool)
    values = {metric: column[own] for metric, column in evaluation.values.items()}
    return Evaluation(evaluation.users[own], (client,) * int(own.sum()), values)


def _summary(runs: Sequence[RunFiles], names: Sequence[str], metric: str, differences: Sequence[Difference]) -> Text:
    told: list[str | Cell | Code] = [f"In {said(metric)}, ", Code(said(names[0])), " has "]
    told += [measured(_told(runs[0]).overall.get(metric)), " over all users."]
    for own in differences:
        if own.metric != metric:
            continue
        told += [" ", Code(said(own.run))]
        if own.difference == 0:
            told.append(" has the same mean.")
            continue
        side = "above" if own.difference > 0 else "below"
        end = ": more than chance." if own.is_one else ": no difference can be told."
        amount = Cell(f"{abs(own.difference):.4f}", own.difference)
        told += [" is ", amount, f" {side} (interval {own.low:+.4f} to {own.high:+.4f}){end}"]
    return told
