"""Users to clients."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pplr.config import PartitionConfig
from pplr.data.holdout import Holdout
from pplr.data.interactions import Dataset
from pplr.errors import PartitionError, nearest
from pplr.seeds import derive_seed, generator
from pplr.storage import sha256_bytes

__all__ = ["Partition", "make_partition", "own_partition"]

_NONE: Final = "(none)"
_DRAWS: Final = 100

Assigned = tuple[NDArray[np.intp], list[str]]  # (U,) client of each user, and the clients' labels


@dataclass(frozen=True)
class Partition:
    """Which client holds which users.

    Args:
        names: The clients' names, "0" to "C-1"; of data that are one client's own, its name.
        users: C arrays of user numbers, ascending; together every user once.
        labels: A phrase for each client that says who its users are.
        sha256: Hash of the clients' names and user ids, so that numbering does not matter.
    """

    names: tuple[str, ...]
    users: tuple[NDArray[np.int32], ...]
    labels: tuple[str, ...]
    sha256: str


def make_partition(dataset: Dataset, holdout: Holdout, config: PartitionConfig, clients: int, seed: int) -> Partition:
    """Share users out among clients. Nothing is cached: the same arguments give the same partition.

    - ``kmeans``: KMeans over the directions of each user's collaborative-filtering factors (alternating least squares
      on train alone; vectors scaled to length 1, or one cluster would hold whoever did little).
    - ``column``: the values of a users' column are dealt to clients, the one with most users first, each to the
      client with the fewest users so far. Users without a value count as having the value "(none)".
    - ``dirichlet``: every user belongs to the genre most frequent in their train (of equals, the first by name), and
      the users of each genre are shared out by p ~ Dirichlet(concentration, ..., concentration). Drawn again, up to
      100 times, until every client has ``min_users``.
    - ``random``: dealt evenly after a shuffle, users with a training sample first.

    Args:
        dataset: U users.
        holdout: Whose train is read; nothing else of it.
        config: Rule, column, concentration, factors and fewest users.
        clients: C.
        seed: The run's seed.

    Raises:
        PartitionError: A client would have fewer than ``min_users`` users with a training sample, or the data lacks
            the column.
    """
    trains = np.array([len(items) >= 2 for items in holdout.train])  # (U,) has a training sample
    if trains.sum() < clients * config.min_users:
        raise PartitionError(
            f"{int(trains.sum())} of {len(trains)} users have a training sample, too few for {clients} clients of at "
            f"least {config.min_users}",
            cure="Lower federation.clients or data.partition.min_users.",
        )
    if config.by == "kmeans":
        client_of, labels = _kmeans(dataset, holdout, config.factors, clients, seed)
    elif config.by == "column":
        client_of, labels = _column(dataset, config.column, clients)
    elif config.by == "dirichlet":
        client_of, labels = _dirichlet(dataset, holdout, config, trains, clients, seed)
    else:
        client_of, labels = _random(trains, clients, seed)
    sizes = np.bincount(client_of[trains], minlength=clients)
    if sizes.min() < config.min_users:
        raise PartitionError(
            f"data.partition.by {config.by!r} gives {clients} clients {', '.join(map(str, sizes))} users with a "
            f"training sample, and each needs {config.min_users}",
            cure="Lower federation.clients or data.partition.min_users, or set data.partition.by to random.",
        )
    users = tuple(np.flatnonzero(client_of == client).astype(np.int32) for client in range(clients))
    names = tuple(str(client) for client in range(clients))
    ids = [[name, sorted(dataset.user_ids[user] for user in own)] for name, own in zip(names, users, strict=True)]
    return Partition(names, users, tuple(labels), sha256_bytes(json.dumps(ids, ensure_ascii=False).encode()))


def own_partition(dataset: Dataset, holdout: Holdout, name: str, min_users: int) -> Partition:
    """Give all users to one client: its data hold nobody else's.

    Args:
        dataset: The client's own.
        holdout: Whose train is read; nothing else of it.
        name: The client's name.
        min_users: Fewest users with a training sample.

    Raises:
        PartitionError: It has fewer.
    """
    trains = sum(len(items) >= 2 for items in holdout.train)
    if trains < min_users:
        raise PartitionError(
            f"client {name} has {trains} users with a training sample, and needs {min_users}",
            cure="Lower data.partition.min_users, or give the folder of all its users.",
        )
    ids = [[name, sorted(dataset.user_ids)]]
    sha256 = sha256_bytes(json.dumps(ids, ensure_ascii=False).encode())
    return Partition((name,), (np.arange(len(holdout.train), dtype=np.int32),), ("all users of its data",), sha256)


def _kmeans(dataset: Dataset, holdout: Holdout, factors: int, clients: int, seed: int) -> Assigned:
    """Cluster the directions of users' factors; single-threaded, because sums in another order are other sums."""
    from scipy.sparse import csr_matrix
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    lengths = [len(items) for items in holdout.train]
    rows = np.repeat(np.arange(len(lengths)), lengths)
    columns = np.concatenate(holdout.train)
    taken = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(lengths), len(dataset.catalog)))
    taken.data[:] = 1.0  # taken again is still taken
    with threadpool_limits(1):
        vectors = _user_factors(taken, factors, derive_seed(seed, "partition", "factors") % 2**32)  # (U, factors)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        model = KMeans(clients, n_init=10, random_state=derive_seed(seed, "partition", "kmeans") % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct users than clients: told by sizes
            model.fit(vectors[np.asarray(lengths) > 0])
        client_of = model.predict(vectors)
    return client_of.astype(np.intp), [f"cluster {client}" for client in range(clients)]


def _user_factors(taken: object, factors: int, seed: int) -> NDArray[np.float64]:
    """Fit implicit's alternating least squares, solved exactly, so that users of one history have one vector.

    Its warning about BLAS threads does not come, as the caller limits them to one.
    """
    from implicit.cpu.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(factors=factors, iterations=15, use_cg=False, num_threads=1, random_state=seed)
    model.fit(taken, show_progress=False)
    return np.asarray(model.user_factors, dtype=np.float64)


def _column(dataset: Dataset, column: str | None, clients: int) -> Assigned:
    known = dataset.user_attributes
    if column is None or column not in known:
        seen = ", ".join(known) or "none"
        raise PartitionError(
            f"data.partition.by 'column' needs data.partition.column, a column of users; {dataset.name} has: {seen}"
            + (f", not {column!r}" if column else ""),
            cure=nearest(column or "", known) if known else "Set data.partition.by to kmeans or random.",
        )
    values = [value or _NONE for value in known[column]]
    counted = sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))
    if len(counted) < clients:
        raise PartitionError(
            f"the users' column {column!r} has {len(counted)} values, too few for {clients} clients",
            cure=f"Lower federation.clients to {len(counted)}, or choose another data.partition.column.",
        )
    sizes, client_by_value = [0] * clients, {}
    dealt: list[list[str]] = [[] for _ in range(clients)]
    for value, count in counted:
        client = sizes.index(min(sizes))
        client_by_value[value] = client
        sizes[client] += count
        dealt[client].append(value)
    return np.array([client_by_value[value] for value in values]), [f"{column}: {_listed(own)}" for own in dealt]


def _dirichlet(
    dataset: Dataset, holdout: Holdout, config: PartitionConfig, trains: NDArray[np.bool_], clients: int, seed: int
) -> Assigned:
    favourites = np.array(_favourites(dataset, holdout, config.column))
    genres = sorted(set(favourites.tolist()))
    rng = generator(seed, "partition", "dirichlet")
    client_of = np.zeros(len(favourites), dtype=np.intp)
    for _ in range(_DRAWS):
        for genre in genres:
            users = rng.permutation(np.flatnonzero(favourites == genre))
            shares = rng.dirichlet(np.full(clients, config.concentration))
            cuts = np.floor(np.cumsum(shares)[:-1] * len(users)).astype(np.intp)
            for client, own in enumerate(np.split(users, cuts)):
                client_of[own] = client
        if np.bincount(client_of[trains], minlength=clients).min() >= config.min_users:
            break
    labels = []
    for client in range(clients):
        counted = Counter(favourites[client_of == client].tolist())
        labels.append(f"mostly {_listed(sorted(counted, key=lambda genre: (-counted[genre], genre)), 2)}")
    return client_of, labels


def _favourites(dataset: Dataset, holdout: Holdout, column: str | None) -> list[str]:
    """Name each user's most frequent genre in train."""
    known = dataset.catalog.attributes
    column = column or next((name for name in ("genre", "category") if name in known), "genre")
    if column not in known:
        seen = ", ".join(known) or "none"
        raise PartitionError(
            f"data.partition.by 'dirichlet' needs a column of genres, {column!r}; the items of {dataset.name} "
            f"have: {seen}",
            cure="Set data.partition.column to a column of the items, or data.partition.by to kmeans or random.",
        )
    genres = [[genre.strip() for genre in text.split("|") if genre.strip()] for text in known[column]]
    favourites: list[str] = []
    for items in holdout.train:
        counted = Counter(genre for item in items.tolist() for genre in genres[item])
        favourites.append(min(counted, key=lambda genre: (-counted[genre], genre)) if counted else _NONE)
    return favourites


def _random(trains: NDArray[np.bool_], clients: int, seed: int) -> Assigned:
    rng = generator(seed, "partition", "random")
    order = np.concatenate([rng.permutation(np.flatnonzero(trains)), rng.permutation(np.flatnonzero(~trains))])
    client_of = np.zeros(len(trains), dtype=np.intp)
    client_of[order] = np.arange(len(order)) % clients
    return client_of, [f"random share {client}" for client in range(clients)]


def _listed(values: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(values[:most])
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown or _NONE
