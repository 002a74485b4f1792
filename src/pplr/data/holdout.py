"""Train, validation and test: each user's history divided in time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pplr.config import HoldoutConfig
from pplr.data.interactions import Dataset
from pplr.errors import DataError, UnknownItemError
from pplr.storage import sha256_bytes

__all__ = ["Holdout", "make_holdout"]

Items = NDArray[np.int32]


@dataclass(frozen=True)
class Holdout:
    """Each user's items of train, validation and test, in order of time.

    Args:
        train: U arrays of item numbers.
        validation: U arrays.
        test: U arrays.
        kind: Which rule made it.
        user_ids: U ids, for the hash; numbers stand in when empty.
        item_ids: N ids, for the hash; numbers stand in when empty.
    """

    train: tuple[Items, ...]
    validation: tuple[Items, ...]
    test: tuple[Items, ...]
    kind: str
    user_ids: tuple[str, ...] = ()
    item_ids: tuple[str, ...] = ()

    def history(self, user: int, before: Literal["validation", "test"]) -> Items:
        """Return what a user did before a part: train, or train and validation.

        Raises:
            UnknownItemError: There is no user of this number.
        """
        if not 0 <= user < len(self.train):
            raise UnknownItemError(
                f"no user has the number {user}, there are {len(self.train)}", cure="Count users from 0."
            )
        if before == "validation":
            return self.train[user]
        return np.concatenate([self.train[user], self.validation[user]])

    @cached_property
    def sha256(self) -> str:
        """Hash of who holds which items in which part and order, by ids, so that numbering does not matter."""
        users = self.user_ids or tuple(str(user) for user in range(len(self.train)))
        lines: list[str] = []
        for user in sorted(range(len(users)), key=users.__getitem__):
            parts = [self._ids(part[user]) for part in (self.train, self.validation, self.test)]
            lines.append(json.dumps([users[user], *parts], ensure_ascii=False))
        return sha256_bytes("\n".join(lines).encode())

    def _ids(self, items: Items) -> list[str]:
        return [self.item_ids[item] if self.item_ids else str(item) for item in items.tolist()]


def make_holdout(dataset: Dataset, config: HoldoutConfig) -> Holdout:
    """Divide each user's history in time.

    Ties in time keep the order of the input. With shares r of train, validation and test, the cuts among E events
    stand at ⌊E · r_train⌋ and ⌊E · (r_train + r_validation)⌋.

    - ``leave_one_out``: the last item is for test, the one before it for validation. Users with fewer than three
      events stay in train.
    - ``global_time``: all events of all users in order of time, cut once at the shares. A user may have no train.
    - ``user_ratio``: each user's own events, cut at the shares. Users with fewer than three events stay in train;
      of the others at least one event is in train, and at least one in test.

    Args:
        dataset: U users, E events.
        config: The rule and its shares.

    Raises:
        DataError: ``global_time`` without times, or no event is left to train on or to test with.
    """
    users = len(dataset.user_ids)
    if config.kind == "global_time":
        part = _by_time(dataset, config.ratios)
    else:
        counts = np.bincount(dataset.interactions.users, minlength=users)
        part = np.zeros(len(dataset.interactions), dtype=np.int8)  # (E,) 0 train, 1 validation, 2 test
        for start, count in zip(np.cumsum(counts) - counts, counts, strict=True):
            if count >= 3:
                first, second = (
                    (count - 2, count - 1) if config.kind == "leave_one_out" else _cuts(int(count), config.ratios)
                )
                part[start + max(first, 1) : start + count] = 1
                part[start + max(second, 1) : start + count] = 2
    for index, name in ((0, "train"), (2, "test")):
        if not (part == index).any():
            raise DataError(
                f"the holdout {config.kind} of {len(part)} interactions of {users} users leaves none for {name}",
                cure="Choose another data.holdout.kind or other ratios, or lower min_rating and cores.",
            )
    train, validation, test = (_parts(dataset, part == index) for index in range(3))
    return Holdout(train, validation, test, config.kind, dataset.user_ids, dataset.catalog.item_ids)


def _by_time(dataset: Dataset, ratios: Sequence[float]) -> NDArray[np.int8]:
    """Give each event its part by one cut through everybody's time, (E,)."""
    events = dataset.interactions
    if events.timestamps is None:
        raise DataError(
            f"the holdout global_time needs timestamps, and {dataset.name} has only an order for each user",
            cure="Set data.holdout.kind to leave_one_out or user_ratio.",
        )
    rows = np.arange(len(events)) if events.rows is None else events.rows
    order = np.lexsort((rows, events.timestamps))
    first, second = _cuts(len(events), ratios)
    part = np.zeros(len(events), dtype=np.int8)
    part[order[first:]] = 1
    part[order[second:]] = 2
    return part


def _cuts(count: int, ratios: Sequence[float]) -> tuple[int, int]:
    """Place both cuts, in exact arithmetic, so that 8:1:1 and 0.8:0.1:0.1 are the same."""
    train, validation, test = (Fraction(repr(float(ratio))) for ratio in ratios)
    total = train + validation + test
    return int(count * train / total), int(count * (train + validation) / total)


def _parts(dataset: Dataset, chosen: NDArray[np.bool_]) -> tuple[Items, ...]:
    """Gather the chosen events' items for each user; events are sorted by user and time already."""
    events = dataset.interactions
    items = events.items[chosen]
    bounds = np.searchsorted(events.users[chosen], np.arange(len(dataset.user_ids) + 1))
    return tuple(items[start:stop] for start, stop in pairwise(bounds))
