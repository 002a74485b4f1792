"""Tables of the paper's claim: each method overall and by its clients, and ``pplr`` against each other method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import METRICS, Record, evaluation_of, read_record
from benchmarks.tables import Section, command, known_interval, table, where
from pplr.recommend.evaluation import Evaluation, paired_bootstrap

FEDERATED, ALONE = "pplr", "local"

Seeds = Mapping[int, Record]


def claim_sections(folder: Path) -> list[Section]:
    """Make the sections of one test: one that says what it is, and one for each holdout and partition.

    Args:
        folder: Records and their ``plan.json``, as ``benchmarks.claim`` wrote them.
    """
    plan = read_record(folder / "plan.json")
    records: dict[tuple[str, str], dict[str, dict[int, Record]]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != "plan.json":
            record = read_record(path)
            job = record["job"]
            own = records.setdefault((job["holdout"], job["partition"]), {})
            own.setdefault(job["method"], {})[job["seed"]] = record
    asked = len(plan["seeds"])
    sections = [Section(folder.name, f"The paper's claim: {folder.name}", _opening(folder, plan))]
    for holdout in plan["holdouts"]:
        for partition in plan["partitions"]:
            found = records.get((holdout, partition), {})
            body = _tables({method: found.get(method, {}) for method in plan["methods"]}, asked)
            slug = f"{folder.name}-{holdout}-{partition}"
            sections.append(Section(slug, f"{holdout}, clients by {partition}", body, level=3))
    return sections


def _opening(folder: Path, plan: Mapping[str, Any]) -> str:
    start = command(dict(plan), "python -m benchmarks.claim")
    return (
        f"`{start} --name {folder.name}`, with `--set backbone.device=cuda` on a GPU; kept in `results/{folder.name}`; "
        "below each table stands which seeds were trained on what. Means over seeds with 95 % intervals (Student's t). "
        "Worst client, gap (best less worst) and std are of the clients' means. Behind: clients, over all seeds, whose "
        "mean is below what `local` gives them. `pplr less this`: each user's values are averaged over the seeds that "
        "both methods have, then users are resampled (paired bootstrap, 10,000 samples); its interval says how far it "
        "would move with other users, not with other seeds. p is two-sided and not corrected for the number of rows."
    )


def _tables(methods: Mapping[str, Seeds], asked: int) -> str:
    measured = [record for own in methods.values() for record in own.values()]
    if not measured:
        return "Not run yet."
    parts = []
    for metric in METRICS:
        head = [metric, "seeds", "overall", "worst client", "gap", "std", "behind", f"{FEDERATED} less this", "p"]
        rows = [method_row(name, methods, asked, metric) for name in methods]
        floors = sorted(measured[0]["floors"].items())
        rows += [[name, "", f"{own[metric]:.4f}", *[""] * 6] for name, own in floors if own[metric] is not None]
        parts.append(table(head, rows))
    return "\n\n".join([*parts, _notes(methods)])


def method_row(name: str, methods: Mapping[str, Seeds], asked: int, metric: str) -> list[str]:
    """Make a method's row.

    Args:
        name: The method.
        methods: All methods' records by seed.
        asked: How many seeds were wanted.
        metric: Which of the metrics that records keep.
    """
    seeds = methods[name]
    count = str(asked) if len(seeds) == asked else f"{len(seeds)} of {asked}"
    runs = [seeds[seed] for seed in sorted(seeds)]
    cells = [known_interval(run["overall"][metric] for run in runs)]
    cells += [known_interval(run["spread"][metric][what] for run in runs) for what in ("worst", "gap", "std")]
    cells.append("" if name == ALONE else behind(seeds, methods.get(ALONE, {}), metric))
    against = ("", "") if name == FEDERATED else difference(methods.get(FEDERATED, {}), seeds, metric)
    return [name, count, *cells, *against]


def behind(seeds: Seeds, alone: Seeds, metric: str) -> str:
    """Count the clients that fare worse than alone, over the seeds that both methods have; nothing without any."""
    pairs = [
        (own[metric], alone[seed]["clients"][name][metric])
        for seed in sorted(seeds.keys() & alone.keys())
        for name, own in seeds[seed]["clients"].items()
    ]
    known = [with_others < by_itself for with_others, by_itself in pairs if None not in (with_others, by_itself)]
    return f"{sum(known)} of {len(known)}" if known else ""


def difference(one: Seeds, other: Seeds, metric: str) -> tuple[str, str]:
    """Tell how far one method is above another over the users that both tested, and p; nothing without any."""
    pair = averaged(one, other, metric)
    if pair is None:
        return "", ""
    mean, low, high, p = paired_bootstrap(*pair, metric)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", f"{p:.4f}"


def averaged(one: Seeds, other: Seeds, metric: str) -> tuple[Evaluation, Evaluation] | None:
    """Average each user's values over the seeds in which both methods tested the user.

    Users are what is drawn anew in a bootstrap, so each counts once however many seeds there are.
    """
    values: dict[int, list[tuple[float, float]]] = {}
    for seed in sorted(one.keys() & other.keys()):
        left, right = (_by_user(side[seed], metric) for side in (one, other))
        for user in sorted(left.keys() & right.keys()):
            values.setdefault(user, []).append((left[user], right[user]))
    if not values:
        return None
    users = np.array(sorted(values), dtype=np.int64)
    means = np.array([np.mean(values[int(user)], axis=0) for user in users])  # (U, 2)
    everyone = ("all",) * len(users)
    first, second = (Evaluation(users, everyone, {metric: means[:, side]}) for side in (0, 1))
    return first, second


def _by_user(record: Record, metric: str) -> dict[int, float]:
    found = evaluation_of(record)
    return dict(zip(found.users.tolist(), found.values[metric].tolist(), strict=True))


def _notes(methods: Mapping[str, Seeds]) -> str:
    """Say how many users each client tests, and what each method took, on each machine by itself."""
    sizes: dict[int, str] = {}
    machines: dict[str, dict[str, dict[int, Record]]] = {}
    for name, own in methods.items():
        for seed, record in own.items():
            sizes.setdefault(seed, "/".join(str(client["users"]) for client in record["clients"].values()))
            machines.setdefault(where(record["machine"]), {}).setdefault(name, {})[seed] = record
    distinct = list(dict.fromkeys(sizes[seed] for seed in sorted(sizes)))
    lines = [f"- Test users of the clients: {'; '.join(distinct)}."]
    for machine in sorted(machines):
        there = machines[machine]
        seeds = sorted({seed for own in there.values() for seed in own})
        took = [f"{name} {_mean_rounds(own)} and {_minutes(own)}" for name, own in there.items()]
        lines.append(
            f"- Measured on {machine}: seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}. "
            f"Rounds and minutes a seed: {', '.join(took)}."
        )
    return "\n".join([*lines, *_mixing_notes(methods)])


def _mixing_notes(methods: Mapping[str, Seeds]) -> list[str]:
    """Say how far each method learned what it trains on, and who could learn from whom by ``pplr``."""
    last = {name: [loss for run in own.values() for loss in run["rounds"][-1]["loss"]] for name, own in methods.items()}
    losses = ", ".join(f"{name} {statistics.fmean(own):.2f}" for name, own in last.items() if own)
    lines = [f"- Training loss in the last server round, mean over clients and seeds: {losses}."] if losses else []
    runs = [own["rounds"] for own in methods.get(FEDERATED, {}).values()]
    ends = [[rounds[place]["similarity"] for rounds in runs if "similarity" in rounds[place]] for place in (0, -1)]
    if all(ends):
        first, final = (f"{min(low for low, _ in own):.4f} to {max(high for _, high in own):.4f}" for own in ends)
        lines.append(f"- Similarity of two clients by {FEDERATED}: {first} in the first round, {final} in the last.")
    shares = []
    for number in range(max((len(rounds) for rounds in runs), default=0)):
        weights = [weight for rounds in runs if number < len(rounds) for weight in rounds[number].get("heating", [])]
        shares += [f"{sum(weight > 0.99 for weight in weights)} of {len(weights)}"] if weights else []
    if shares:
        lines.append(f"- Clients of {FEDERATED} whose heating weight is above .99, by round: {', '.join(shares)}.")
    return lines


def _mean_rounds(seeds: Seeds) -> str:
    return f"{statistics.fmean(len(record['rounds']) for record in seeds.values()):.1f}"


def _minutes(seeds: Seeds) -> str:
    totals = [own["seconds"]["total"] for own in seeds.values() if own["seconds"]["total"] is not None]
    return f"{statistics.fmean(totals) / 60:.1f}" if totals else "not timed"


def claim_folders(results: Path) -> Sequence[Path]:
    """List the tests that are kept."""
    return [path.parent for path in sorted(results.glob("*/plan.json"))]
