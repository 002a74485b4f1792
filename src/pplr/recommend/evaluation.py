"""Every user ranked against the full catalog, then told overall, for each client, and how far clients differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pplr.data.prompts import Case
from pplr.errors import ConfigError, DataError, nearest
from pplr.recommend.metrics import batch_ranks, ranking_metrics, spread, summarise
from pplr.seeds import generator

__all__ = [
    "Evaluation",
    "QueueRanker",
    "Ranker",
    "SizedRanker",
    "evaluate",
    "in_batches",
    "merge",
    "metric_value",
    "paired_bootstrap",
    "scored",
]


@runtime_checkable
class Ranker(Protocol):
    """Anything that scores the full catalog for a user: a backbone with its grounding, or a floor."""

    def scores(self, cases: Sequence[Case]) -> NDArray[np.float32]:
        """Score every item for every case: (B, N), higher is better, seen items not yet masked."""
        ...


@runtime_checkable
class SizedRanker(Ranker, Protocol):
    """A ranker that pads the cases of a batch to the longest, and does best where they are alike."""

    def sizes(self, cases: Sequence[Case]) -> Sequence[int]:
        """Tell how long each case is."""
        ...


@runtime_checkable
class QueueRanker(Ranker, Protocol):
    """A ranker that goes on with whoever waits as soon as somebody is done."""

    @property
    def queues(self) -> bool:
        """Whether it does so as it is set up."""
        ...

    def queued(self, cases: Sequence[Case], places: int) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Score cases of which so many are under way at a time.

        Yields:
            The places among the cases of some that are done, and their scores: (B, N).
        """
        ...


def scored(ranker: Ranker, cases: Sequence[Case], batch_size: int) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Score cases, some at a time.

    Args:
        ranker: Who scores.
        cases: U cases.
        batch_size: Most cases at once.

    Yields:
        Places among the cases and their scores, (B, N); every case once, in no particular order.
    """
    if isinstance(ranker, QueueRanker) and ranker.queues:
        yield from ranker.queued(cases, batch_size)
        return
    for places in in_batches(ranker, cases, batch_size):
        yield places, ranker.scores([cases[place] for place in places])


def in_batches(ranker: Ranker, cases: Sequence[Case], batch_size: int) -> list[list[int]]:
    """Share cases out among batches, by their places: cases of like size together where the ranker knows sizes."""
    order = list(range(len(cases)))
    if isinstance(ranker, SizedRanker):
        sizes = ranker.sizes(cases)
        order.sort(key=lambda place: sizes[place])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Each tested user's metrics.

    Args:
        users: (B,) user numbers, each once.
        client_of: The client of each user, B names.
        values: For each metric, (B,) values.
        clients: Every client's name in order, also those without a tested user; those of ``client_of`` when empty.
    """

    users: NDArray[np.int64]
    client_of: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]
    clients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(len(column) != len(self.users) for column in (self.client_of, *self.values.values())):
            raise DataError(
                f"the values are not one for each of the {len(self.users)} users", cure="Evaluate these users again."
            )
        if len(np.unique(self.users)) != len(self.users):
            raise DataError("a user is evaluated twice", cure="Give every user to one client, and each case once.")
        named = dict.fromkeys((*self.clients, *self.client_of))
        object.__setattr__(self, "clients", tuple(named))

    def overall(self) -> dict[str, float | None]:
        """Average over all users, every user counting the same; ``None`` without users."""
        return summarise(self.values)

    def by_client(self) -> dict[str, dict[str, float | int | None]]:
        """Average over each client's users: ``users``, their number, then each metric."""
        owners = np.array(self.client_of, dtype=object)
        told: dict[str, dict[str, float | int | None]] = {}
        for client in self.clients:
            own = owners == client
            told[client] = {"users": int(own.sum())}
            told[client] |= summarise({metric: values[own] for metric, values in self.values.items()})
        return told

    def spread(self, metrics: Sequence[str] | None = None) -> dict[str, dict[str, float | None]]:
        """Say how far the clients' means differ: ``worst``, ``best``, ``std`` and ``gap`` of each metric.

        Args:
            metrics: Which; all when absent.

        Raises:
            ConfigError: A metric was not measured.
        """
        by_client = self.by_client()
        names = list(self.values) if metrics is None else list(metrics)
        return {name: spread({client: _lookup(means, name) for client, means in by_client.items()}) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Write as plain lists and numbers, ready for JSON."""
        return {
            "clients": list(self.clients),
            "users": [int(user) for user in self.users],
            "client_of": list(self.client_of),
            "values": {metric: [float(value) for value in values] for metric, values in self.values.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evaluation:
        """Read what :meth:`to_dict` wrote.

        Raises:
            DataError: A part is missing or does not fit the others.
        """
        try:
            return cls(
                users=np.array(content["users"], dtype=np.int64),
                client_of=tuple(map(str, content["client_of"])),
                values={str(name): np.array(column, dtype=np.float64) for name, column in content["values"].items()},
                clients=tuple(map(str, content["clients"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"this is no stored evaluation: {type(error).__name__} {error}", cure="Run `pplr evaluate` again."
            ) from error


def evaluate(
    rankers: Mapping[str, Ranker] | Ranker,
    cases: Mapping[str, Sequence[Case]],
    cutoffs: Sequence[int],
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Rank every case's targets in the full catalog and measure them.

    Args:
        rankers: One for each client's name (personalised), or one for all.
        cases: Each client's cases, by its name; a client may have none.
        cutoffs: The K of recall@K, ndcg@K and hit@K.
        batch_size: Cases scored at once.
        progress: Called with the number of cases done since.

    Returns:
        The metrics of each user, in the order of ``cases``.

    Raises:
        ConfigError: A cutoff or the batch size is not positive.
        DataError: A client has no ranker, a user comes twice, or the scores cannot be ranked.
    """
    if batch_size < 1:
        raise ConfigError(f"a batch of {batch_size} users cannot be scored", cure="Set the batch size to 1 or more.")
    metrics = list(ranking_metrics([1], cutoffs))
    users: list[int] = []
    client_of: list[str] = []
    rows: list[list[float]] = []
    for client, own in cases.items():
        ranker = _ranker_of(rankers, client)
        found: dict[int, list[float]] = {}
        for places, scores in scored(ranker, own, batch_size):
            batch = [own[place] for place in places]
            for place, ranks in zip(places, batch_ranks(scores, batch), strict=True):
                found[place] = list(ranking_metrics(ranks, cutoffs).values())
            if progress is not None:
                progress(len(batch))
        users += [case.user for case in own]
        client_of += [client] * len(own)
        rows += [found[place] for place in range(len(own))]
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(metrics))
    columns = {metric: table[:, place] for place, metric in enumerate(metrics)}
    return Evaluation(np.array(users, dtype=np.int64), tuple(client_of), columns, tuple(cases))


def _ranker_of(rankers: Mapping[str, Ranker] | Ranker, client: str) -> Ranker:
    if not isinstance(rankers, Mapping):
        return rankers
    if client not in rankers:
        raise DataError(f"no ranker for client {client!r}", cure=nearest(client, rankers))
    return rankers[client]


def merge(evaluations: Iterable[Evaluation]) -> Evaluation:
    """Put evaluations of different users together, such as those of clients tested apart.

    Raises:
        DataError: They share a user, or measure different metrics, or there is none.
    """
    parts = list(evaluations)
    if not parts:
        raise DataError("no evaluation to merge", cure="Give at least one.")
    metrics = list(parts[0].values)
    if any(set(part.values) != set(metrics) for part in parts):
        raise DataError("the evaluations measure different metrics", cure="Evaluate with the same cutoffs.")
    return Evaluation(
        users=np.concatenate([part.users for part in parts]),
        client_of=tuple(client for part in parts for client in part.client_of),
        values={metric: np.concatenate([part.values[metric] for part in parts]) for metric in metrics},
        clients=tuple(client for part in parts for client in part.clients),
    )


def metric_value(evaluation: Evaluation | Mapping[str, Any], metric: str) -> float | None:
    """Read one overall metric.

    Args:
        evaluation: An evaluation, its ``overall()``, or the content of ``metrics.json``.
        metric: Such as ``ndcg@10``.

    Raises:
        ConfigError: The metric was not measured; the message names the nearest.

    Example:
        >>> metric_value({"overall": {"ndcg@10": 0.25, "mrr": None}}, "ndcg@10")
        0.25
    """
    overall: Mapping[str, Any] = evaluation.overall() if isinstance(evaluation, Evaluation) else evaluation
    return _lookup(overall.get("overall", overall), metric)


def _lookup(means: Mapping[str, Any], metric: str) -> float | None:
    if metric not in means:
        known = [name for name in means if name != "users"]
        raise ConfigError(f"the metric {metric!r} was not measured", cure=nearest(metric, known))
    return None if means[metric] is None else float(means[metric])


def paired_bootstrap(
    a: Evaluation, b: Evaluation, metric: str, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float, float]:
    r"""Compare two evaluations of the same users by resampling users with replacement.

    d_u = a_u - b_u;  p = min(1, 2 min(#{mean d* ≤ 0} + 1, #{mean d* ≥ 0} + 1) / (samples + 1))

    Users that only one of the two tested are left out.

    Returns:
        The mean difference a - b, the 2.5 % and 97.5 % quantiles of its resampled values, and the two-sided p.

    Raises:
        ConfigError: The metric was not measured in both, or ``samples`` is not positive.
        DataError: The two share no user.
    """
    if samples < 1:
        raise ConfigError(f"{samples} bootstrap samples say nothing", cure="Draw at least 1,000.")
    shared, in_a, in_b = np.intersect1d(a.users, b.users, return_indices=True)
    for evaluation in (a, b):
        if metric not in evaluation.values:
            raise ConfigError(f"the metric {metric!r} was not measured", cure=nearest(metric, evaluation.values))
    if not len(shared):
        raise DataError("the two evaluations share no user", cure="Compare runs on the same data and holdout.")
    differences = a.values[metric][in_a] - b.values[metric][in_b]  # (U,)
    draw = generator(seed, "paired bootstrap", metric)
    at_once = max(1, 4_000_000 // len(differences))
    means = np.concatenate(
        [
            differences[draw.integers(len(differences), size=(min(at_once, samples - done), len(differences)))].mean(1)
            for done in range(0, samples, at_once)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return float(differences.mean()), float(low), float(high), min(1.0, 2 * (tail + 1) / (samples + 1))
