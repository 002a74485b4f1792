"""One finished run as a small file that is committed: its figures, and what each tested user's ranking was worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import machine
from pplr.config import Config
from pplr.data.prompts import Case
from pplr.errors import ConfigError, DataError, RunError
from pplr.recommend.evaluation import Evaluation
from pplr.runtimes.run import Run
from pplr.storage import write_atomic

METRICS = ("recall@10", "ndcg@10")
_DIGITS = 6

Record = dict[str, Any]

_PLACES = ("runtime.", "backbone.device", "data.path", "data.items_path")
"""What no result depends on: where it runs, and where its data lie. What ends with a dot is a whole section."""


def settings_of(config: Config) -> dict[str, Any]:
    """Tell what a result depends on: every field not at its default, but where it runs and where its data lie."""
    told = config.model_dump(mode="json", exclude_defaults=True)
    for section, _, field in (place.partition(".") for place in _PLACES):
        if field:
            told.get(section, {}).pop(field, None)
        else:
            told.pop(section, None)
    return told


def without_places(overrides: Sequence[str]) -> list[str]:
    """Leave out of settings, as ``section.field=value``, what :func:`settings_of` leaves out."""
    return [own for own in overrides if not own.startswith(tuple(p if p.endswith(".") else f"{p}=" for p in _PLACES))]


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Name the first setting in which two differ; ``None`` where they are the same."""
    there, here = dict(_flat(before)), dict(_flat(after))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            shown = [str(side[key]) if key in side else "at its default" for side in (there, here)]
            return f"{key} is {shown[0]} there and {shown[1]} here"
    return None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_metrics(config: Config) -> None:
    """Refuse a configuration that does not measure what a record keeps."""
    if 10 not in config.evaluation.cutoffs:
        raise ConfigError(
            f"evaluation.cutoffs is {list(config.evaluation.cutoffs)}, and records keep {' and '.join(METRICS)}",
            cure="Add 10 to evaluation.cutoffs.",
        )


def where_trained(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Tell the threads of a run, and the accelerator if there was one."""
    told = provenance["machine"]
    device = told.get("device", "cpu")
    return {"threads": told["threads"]} | ({} if device == "cpu" else {"device": device})


def record_of(run: Run) -> Record:
    """Sum up a finished run."""
    metrics, provenance = run.metrics, run.provenance
    if metrics is None:
        raise RunError(f"the run in {run.folder} is not finished", cure="Run the same command again.")
    return {
        "settings": settings_of(run.config),
        "machine": {"processor": machine()["processor"], **where_trained(provenance)},
        "holdout_sha256": provenance["holdout_sha256"],
        "rounds": [_round(own) for own in run.rounds],
        "seconds": {name: None if own is None else round(own, 1) for name, own in metrics["seconds"].items()},
        "floors": {name: _rounded({key: own[key] for key in METRICS}) for name, own in metrics["floors"].items()},
        **_measured(run.evaluation(), provenance["partition_sha256"]),
    }


def _measured(found: Evaluation, partition_sha256: str) -> Record:
    """Tell an evaluation: what follows from a partition, and each user's values unless all of them are 0."""
    rows = zip(found.users.tolist(), *(found.values[metric].tolist() for metric in METRICS), strict=True)
    owners = np.array(found.client_of, dtype=object)
    return {
        "partition_sha256": partition_sha256,
        "overall": _rounded(found.overall()),
        "clients": {name: _rounded(own, ("users", *METRICS)) for name, own in found.by_client().items()},
        "spread": {metric: _rounded(own) for metric, own in found.spread(METRICS).items()},
        "tested": {name: found.users[owners == name].tolist() for name in found.clients},
        "hits": {str(user): [round(value, _DIGITS) for value in own] for user, *own in rows if any(own)},
    }


def _rounded(figures: Mapping[str, Any], names: tuple[str, ...] | None = None) -> dict[str, Any]:
    chosen = figures if names is None else {name: figures[name] for name in names}
    return {name: round(own, _DIGITS) if isinstance(own, float) else own for name, own in chosen.items()}


def _round(told: Mapping[str, Any]) -> Record:
    """Keep what says who could learn from whom: losses, heating, and the ends of the similarity of two clients."""
    clients = [own for own in told["clients"].values() if own.get("samples")]
    kept: Record = {"loss": [round(own["loss"], 4) for own in clients]}
    if clients and clients[0].get("heating_weight") is not None:
        kept["heating"] = [round(own["heating_weight"], 4) for own in clients]
    if told["similarity"] is not None:
        table = np.array(told["similarity"])
        others = table[~np.eye(len(table), dtype=bool)]
        if others.size:
            kept["similarity"] = [round(float(others.min()), 6), round(float(others.max()), 6)]
    return kept


def evaluation_of(record: Mapping[str, Any]) -> Evaluation:
    """Read each tested user's values back."""
    users = [(user, name) for name, own in record["tested"].items() for user in own]
    nothing = [0.0] * len(METRICS)
    values = np.array([record["hits"].get(str(user), nothing) for user, _ in users], dtype=np.float64)
    values = values.reshape(len(users), len(METRICS))
    return Evaluation(
        users=np.array([user for user, _ in users], dtype=np.int64),
        client_of=tuple(name for _, name in users),
        values={metric: values[:, place] for place, metric in enumerate(METRICS)},
        clients=tuple(record["tested"]),
    )


def regroup(record: Mapping[str, Any], config: Config, test: Mapping[str, list[Case]], partition_sha256: str) -> Record:
    """Measure by another partition what no partition had a part in: a model trained on the pooled data.

    Args:
        record: Of a run of the same holdout.
        config: The other run's configuration.
        test: The test cases of each client of the other partition.
        partition_sha256: Its hash.

    Raises:
        DataError: The partition's tested users are others.
    """
    before = evaluation_of(record)
    owner = {case.user: name for name, own in test.items() for case in own}
    if set(owner) != set(before.users.tolist()):
        raise DataError(
            f"{len(owner)} users are tested by this partition, and {len(before.users)} others were measured",
            cure="Train for this partition as well.",
        )
    order = {name: place for place, name in enumerate(test)}
    rows = np.array(sorted(range(len(before.users)), key=lambda row: (order[owner[int(before.users[row])]], row)))
    found = Evaluation(
        users=before.users[rows],
        client_of=tuple(owner[int(user)] for user in before.users[rows]),
        values={metric: values[rows] for metric, values in before.values.items()},
        clients=tuple(test),
    )
    measured = _measured(found, partition_sha256) | {"overall": record["overall"]}
    return {**record, "settings": settings_of(config), **measured}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record atomically, a line for each part."""
    lines = [f"{json.dumps(key)}: {json.dumps(own, separators=(',', ':'))}" for key, own in record.items()]
    write_atomic(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_record(path: Path) -> Record:
    """Read a record."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RunError(f"{path} is no record of a run: {error}", cure="Delete it, and run again.") from None
