"""What happened: who took which item when, and what the items are called.

Items are ids, numbered by their position in the catalog; a title is only text, and several items may
share one. Users are numbered by their position in ``user_ids``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pplr.errors import ConfigError, DataError, UnknownItemError, nearest
from pplr.storage import sha256_bytes

__all__ = ["Catalog", "Dataset", "Interactions"]


@dataclass(frozen=True)
class Catalog:
    """The items, in a fixed order.

    Args:
        item_ids: N ids, each once.
        titles: N texts to show; not unique.
        attributes: Other columns of the items, N values each (genres are separated by ``|``).
    """

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.item_ids) != len(self.titles) or len(set(self.item_ids)) != len(self.item_ids):
            raise DataError("the catalog's ids are not unique or not one for each title", cure="Check the items file.")

    def __len__(self) -> int:
        return len(self.item_ids)

    def columns(self, names: Sequence[str], asked_by: str) -> list[tuple[str, ...]]:
        """Return some columns of the items.

        Args:
            names: Their names.
            asked_by: The setting that names them, for the error.

        Raises:
            ConfigError: There is no such column.
        """
        for name in names:
            if name not in self.attributes:
                known = list(self.attributes)
                raise ConfigError(
                    f"{asked_by} names {name!r}, which no item has",
                    cure=nearest(name, known) if known else "This catalog has titles alone.",
                )
        return [self.attributes[name] for name in names]

    @cached_property
    def by_title(self) -> Mapping[str, tuple[int, ...]]:
        """All items of a title, in catalog order."""
        found: dict[str, list[int]] = {}
        for item, title in enumerate(self.titles):
            found.setdefault(title, []).append(item)
        return {title: tuple(items) for title, items in found.items()}

    @cached_property
    def _by_folded(self) -> Mapping[str, tuple[int, ...]]:
        found: dict[str, list[int]] = {}
        for title, items in self.by_title.items():
            found.setdefault(" ".join(title.casefold().split()), []).extend(items)
        return {title: tuple(sorted(items)) for title, items in found.items()}

    @cached_property
    def sha256(self) -> str:
        """Hash of ids and titles in order."""
        return sha256_bytes("\n".join(f"{i}\t{t}" for i, t in zip(self.item_ids, self.titles, strict=True)).encode())

    def find(self, title: str) -> tuple[int, ...]:
        """Find the items of a title typed by a person; case and runs of spaces do not matter.

        Returns:
            All items of that title, in catalog order.

        Raises:
            UnknownItemError: No item has the title; the message names the nearest.
        """
        folded = " ".join(title.casefold().split())
        if items := self._by_folded.get(folded):
            return items
        hint = nearest(folded, self._by_folded)
        if hint.startswith("Did you mean"):
            close = hint.removeprefix("Did you mean ").removesuffix("?").strip("'\"")
            items = self._by_folded.get(close, ())
            hint = f"Did you mean {self.titles[items[0]]!r}?" if items else hint
        else:
            hint = "Give titles as the catalog writes them, separated by ';'."
        raise UnknownItemError(f"no item in the catalog is called {title!r}", cure=hint)


@dataclass(frozen=True)
class Interactions:
    """E events, sorted by user, then time, then input order.

    Args:
        users: (E,) user numbers.
        items: (E,) item numbers.
        ratings: (E,) ratings, or ``None`` when the data has none.
        timestamps: (E,) times in seconds, or ``None`` when the data gives only an order.
        rows: (E,) positions in the input, each once, which order ties between users; the order here when ``None``.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    ratings: NDArray[np.float32] | None = None
    timestamps: NDArray[np.float64] | None = None
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class Dataset:
    """Interactions with the catalog and the users they are about.

    Args:
        name: The source's name.
        user_ids: U ids, in the order of first appearance.
        catalog: N items.
        interactions: E events.
        user_attributes: Columns of the users, U values each.
        notes: One line for each thing that cleaning did, with counts.
    """

    name: str
    user_ids: tuple[str, ...]
    catalog: Catalog
    interactions: Interactions
    user_attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def histories(self) -> tuple[NDArray[np.int32], ...]:
        """Each user's items in order, U arrays."""
        bounds = np.searchsorted(self.interactions.users, np.arange(len(self.user_ids) + 1))
        return tuple(self.interactions.items[a:b] for a, b in pairwise(bounds))

    def user(self, user_id: str) -> int:
        """Find a user's number.

        Raises:
            UnknownItemError: The data holds no such user.
        """
        try:
            return self._users[user_id]
        except KeyError:
            raise UnknownItemError(
                f"no user {user_id!r} in {self.name}", cure=nearest(user_id, self.user_ids)
            ) from None

    @cached_property
    def _users(self) -> Mapping[str, int]:
        return {user_id: user for user, user_id in enumerate(self.user_ids)}
