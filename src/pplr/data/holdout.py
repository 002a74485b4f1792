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
from pplr.seeds import generator
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
        unseen: Items that are in no train and no validation, on purpose.
        masked: U arrays of unseen items that a user took before test: not shown, and not recommended again.
    """

    train: tuple[Items, ...]
    validation: tuple[Items, ...]
    test: tuple[Items, ...]
    kind: str
    user_ids: tuple[str, ...] = ()
    item_ids: tuple[str, ...] = ()
    unseen: tuple[int, ...] = ()
    masked: tuple[Items, ...] = ()

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

    def not_recommended(self, user: int, part: Literal["validation", "test"]) -> list[int]:
        """Return what is masked besides a user's history: of unseen items all in validation, in test the user's own."""
        if part == "validation":
            return list(self.unseen)
        return self.masked[user].tolist() if self.masked else []

    @cached_property
    def sha256(self) -> str:
        """Hash of who holds which items in which part and order, by ids, so that numbering does not matter."""
        users = self.user_ids or tuple(str(user) for user in range(len(self.train)))
        lines: list[str] = []
        for user in sorted(range(len(users)), key=users.__getitem__):
            parts = [self._ids(part[user]) for part in (self.train, self.validation, self.test)]
            parts += [self._ids(self.masked[user])] if self.masked else []
            lines.append(json.dumps([users[user], *parts], ensure_ascii=False))
        if self.unseen:
            lines.append(json.dumps(sorted(self._ids(np.array(self.unseen, dtype=np.int32))), ensure_ascii=False))
        return sha256_bytes("\n".join(lines).encode())

    def _ids(self, items: Items) -> list[str]:
        return [self.item_ids[item] if self.item_ids else str(item) for item in items.tolist()]


def make_holdout(dataset: Dataset, config: HoldoutConfig, seed: int = 0) -> Holdout:
    """Divide each user's history in time.

    Ties in time keep the order of the input. With shares r of train, validation and test, the cuts among E events
    stand at ⌊E · r_train⌋ and ⌊E · (r_train + r_validation)⌋.

    - ``leave_one_out``: the last item is for test, the one before it for validation. Users with fewer than three
      events stay in train.
    - ``global_time``: all events of all users in order of time, cut once at the shares. A user may have no train.
    - ``user_ratio``: each user's own events, cut at the shares. Users with fewer than three events stay in train;
      of the others at least one event is in train, and at least one in test.
    - ``unseen_items``: for cold start of items. A share of the items that anyone took is drawn. A user's test target is
      the newest of them with another item before it; what came before it, without unseen items, is train, but for the
      last of two or more, which is for validation; what came after it is left out. Of users without such a target,
      everything but unseen items is divided in the same way.
    - ``new_users``: for cold start of users. Of users with two events or more a share is drawn: the first event is
      train, the second test, and the others are left out. Of other users with three events or more the last is for
      validation.

    Args:
        dataset: U users, E events.
        config: The rule and its shares.
        seed: The run's seed, for the rules that draw.

    Raises:
        DataError: ``global_time`` without times, or no event is left to train on or to test with.
    """
    users = len(dataset.user_ids)
    unseen, masked = np.zeros(0, dtype=np.int32), np.zeros(len(dataset.interactions), dtype=np.bool_)
    if config.kind == "global_time":
        part = _by_time(dataset, config.ratios)
    elif config.kind == "unseen_items":
        part, unseen, masked = _without_items(dataset, config.share, seed)
    elif config.kind == "new_users":
        part = _by_new_users(dataset, config.share, seed)
    else:
        counts = np.bincount(dataset.interactions.users, minlength=users)
        part = np.zeros(len(dataset.interactions), dtype=np.int8)  # (E,)
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
                cure="Choose another data.holdout.kind, other ratios or another share, or lower min_rating and cores.",
            )
    train, validation, test = (_parts(dataset, part == index) for index in range(3))
    return Holdout(
        train,
        validation,
        test,
        config.kind,
        dataset.user_ids,
        dataset.catalog.item_ids,
        tuple(unseen.tolist()),
        _parts(dataset, masked) if masked.any() else (),
    )


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


def _without_items(dataset: Dataset, share: float, seed: int) -> tuple[NDArray[np.int8], Items, NDArray[np.bool_]]:
    """Draw unseen items; give each event its part, -1 where it has none, and say which are masked: (E,), (S,), (E,)."""
    events = dataset.interactions
    unseen = _drawn(np.unique(events.items), share, seed, "unseen items")
    is_unseen = np.isin(events.items, unseen)
    part, masked = np.full(len(events), -1, dtype=np.int8), np.zeros(len(events), dtype=np.bool_)
    bounds = np.searchsorted(events.users, np.arange(len(dataset.user_ids) + 1))
    for start, stop in pairwise(bounds.tolist()):
        known = np.flatnonzero(~is_unseen[start:stop])
        new = np.flatnonzero(is_unseen[start:stop])
        _, firsts = np.unique(events.items[start:stop], return_index=True)
        targets = np.intersect1d(new[new > known[0]], firsts) if len(known) else new[:0]
        if len(targets):
            target = targets[-1]
            known = known[known < target]
            part[start + target] = 2
            masked[start + new[new < target]] = True
        part[start + known] = 0
        if len(known) > 1:
            part[start + known[-1]] = 1
    return part, unseen.astype(np.int32), masked


def _by_new_users(dataset: Dataset, share: float, seed: int) -> NDArray[np.int8]:
    """Draw new users, and give each event its part, -1 where it has none: (E,)."""
    events = dataset.interactions
    counts = np.bincount(events.users, minlength=len(dataset.user_ids))
    new = set(_drawn(np.flatnonzero(counts >= 2), share, seed, "new users").tolist())
    part = np.zeros(len(events), dtype=np.int8)
    for user, (start, count) in enumerate(zip(np.cumsum(counts) - counts, counts, strict=True)):
        if user in new:
            part[start + 1 : start + count] = -1
            part[start + 1] = 2
        elif count >= 3:
            part[start + count - 1] = 1
    return part


def _drawn(numbers: NDArray[np.integer], share: float, seed: int, what: str) -> NDArray[np.integer]:
    """Draw a share of some numbers, at least one if there is any, in ascending order."""
    count = min(len(numbers), max(1, round(len(numbers) * share)))
    return np.sort(generator(seed, "holdout", what).permutation(numbers)[:count])


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
