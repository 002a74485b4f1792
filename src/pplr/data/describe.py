"""Data in numbers: counts, density, lengths, titles, ties, and how large the clients are."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from pplr.data.holdout import Holdout
from pplr.data.interactions import Dataset
from pplr.data.partition import Partition

__all__ = ["ClientDescription", "Description", "describe"]


@dataclass(frozen=True)
class ClientDescription:
    """One client in numbers.

    Args:
        name: The client's name.
        label: The phrase that says who its users are.
        users: Its users.
        interactions: Their events.
        training_users: Users with a training sample, or ``None`` without a holdout.
        training_samples: Training samples, or ``None``.
        validation: Events held out for validation, or ``None``.
        test: Events held out for test, or ``None``.
    """

    name: str
    label: str
    users: int
    interactions: int
    training_users: int | None = None
    training_samples: int | None = None
    validation: int | None = None
    test: int | None = None

    def row(self) -> tuple[str, ...]:
        """Write the numbers for a table, a dash for what is not known."""
        numbers = (
            self.users,
            self.interactions,
            self.training_users,
            self.training_samples,
            self.validation,
            self.test,
        )
        return (self.name, self.label, *("-" if number is None else f"{number:,}" for number in numbers))


@dataclass(frozen=True)
class Description:
    """A dataset in numbers.

    Args:
        name: The source's name.
        users: U.
        items: N.
        interactions: E.
        density: E / (U · N).
        lengths: Fewest, median, mean and most events of a user.
        ratings: Lowest, mean and highest rating, or ``None``.
        times: First and last Unix time in seconds, or ``None``.
        duplicate_titles: Titles that several items share.
        items_sharing_a_title: Items that such titles have.
        empty_titles: Items without a title, which are shown by their id.
        repeated: Events of an item that the user had taken before.
        tied: Events at the same time as another of the same user, or ``None`` without times.
        users_tied_at_the_end: Users whose last event is tied, so that the tie rule chose their test item.
        train: Events in train, or ``None`` without a holdout.
        validation: Events in validation, or ``None``.
        test: Events in test, or ``None``.
        clients: One for each client, none without a partition.
        notes: What reading and cleaning did.
    """

    name: str
    users: int
    items: int
    interactions: int
    density: float
    lengths: tuple[int, float, float, int]
    ratings: tuple[float, float, float] | None
    times: tuple[float, float] | None
    duplicate_titles: int
    items_sharing_a_title: int
    empty_titles: int
    repeated: int
    tied: int | None
    users_tied_at_the_end: int | None
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    clients: tuple[ClientDescription, ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """Write names and numbers for a table, without the clients."""
        fewest, middle, mean, most = self.lengths
        rows = [
            ("source", self.name),
            ("users", f"{self.users:,}"),
            ("items", f"{self.items:,}"),
            ("interactions", f"{self.interactions:,}"),
            ("density", f"{self.density:.4%}"),
            ("history length", f"{fewest:,} to {most:,}, median {middle:g}, mean {mean:.1f}"),
        ]
        if self.ratings is not None:
            low, average, high = self.ratings
            rows.append(("ratings", f"{low:g} to {high:g}, mean {average:.2f}"))
        if self.times is not None:
            first, last = (str(np.datetime64(int(time), "s")).partition("T")[0] for time in self.times)
            rows.append(("time", f"{first} to {last}"))
        rows += [
            ("duplicate titles", f"{self.duplicate_titles:,}, shared by {self.items_sharing_a_title:,} items"),
            ("empty titles", f"{self.empty_titles:,}"),
            ("repeated interactions", f"{self.repeated:,}"),
        ]
        if self.tied is not None:
            rows.append(
                ("ties in time", f"{self.tied:,} interactions, {self.users_tied_at_the_end:,} users at the end")
            )
        for part in ("train", "validation", "test"):
            if (count := getattr(self, part)) is not None:
                rows.append((part, f"{count:,}"))
        rows += [("note", note) for note in self.notes]
        return rows


def describe(dataset: Dataset, holdout: Holdout | None = None, partition: Partition | None = None) -> Description:
    """Count what matters before a run.

    Args:
        dataset: What to describe.
        holdout: Adds the sizes of its parts.
        partition: Adds the clients; their training samples need the holdout too.
    """
    events, catalog, users = dataset.interactions, dataset.catalog, len(dataset.user_ids)
    lengths = [len(history) for history in dataset.histories]
    shared = [len(items) for items in catalog.by_title.values() if len(items) > 1]
    pairs = len(np.unique(events.users.astype(np.int64) * len(catalog) + events.items))
    ratings = None
    if events.ratings is not None and not np.isnan(events.ratings).all():
        known = events.ratings[~np.isnan(events.ratings)].astype(float)
        ratings = (float(known.min()), float(known.mean()), float(known.max()))
    times, tied, tied_at_the_end = None, None, None
    if events.timestamps is not None:
        times = (float(events.timestamps.min()), float(events.timestamps.max()))
        same = (events.users[1:] == events.users[:-1]) & (events.timestamps[1:] == events.timestamps[:-1])
        is_tied = np.append(same, False) | np.append(False, same)  # (E,)
        last = np.append(events.users[1:] != events.users[:-1], True)
        tied, tied_at_the_end = int(is_tied.sum()), int((is_tied & last).sum())
    parts: dict[str, int] = {}
    if holdout is not None:
        parts = {part: sum(len(items) for items in getattr(holdout, part)) for part in ("train", "validation", "test")}
    return Description(
        name=dataset.name,
        users=users,
        items=len(catalog),
        interactions=len(events),
        density=len(events) / (users * len(catalog)),
        lengths=(min(lengths), float(median(lengths)), len(events) / users, max(lengths)),
        ratings=ratings,
        times=times,
        duplicate_titles=len(shared),
        items_sharing_a_title=sum(shared),
        empty_titles=sum(
            not title or title == item for item, title in zip(catalog.item_ids, catalog.titles, strict=True)
        ),
        repeated=len(events) - pairs,
        tied=tied,
        users_tied_at_the_end=tied_at_the_end,
        clients=_clients(dataset, holdout, partition),
        notes=dataset.notes,
        **parts,
    )


def _clients(dataset: Dataset, holdout: Holdout | None, partition: Partition | None) -> tuple[ClientDescription, ...]:
    if partition is None:
        return ()
    found: list[ClientDescription] = []
    for name, label, users in zip(partition.names, partition.labels, partition.users, strict=True):
        own = users.tolist()
        counts: dict[str, int] = {}
        if holdout is not None:
            samples = [len(holdout.train[user]) - 1 for user in own if len(holdout.train[user]) > 1]
            counts = {
                "training_users": len(samples),
                "training_samples": sum(samples),
                "validation": sum(len(holdout.validation[user]) for user in own),
                "test": sum(len(holdout.test[user]) for user in own),
            }
        interactions = sum(len(dataset.histories[user]) for user in own)
        found.append(ClientDescription(name, label, len(own), interactions, **counts))
    return tuple(found)
