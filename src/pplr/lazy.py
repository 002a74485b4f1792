"""A mapping whose values are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

__all__ = ["LazyMapping"]

T = TypeVar("T")


class LazyMapping(Mapping[str, T]):
    """Values by name, each made anew whenever it is asked for, so that one is in memory at a time.

    Args:
        names: The keys, in order.
        make: Makes the value of one.

    Example:
        >>> lengths = LazyMapping(["one", "three"], len)
        >>> list(lengths.items()), "two" in lengths
        ([('one', 3), ('three', 5)], False)
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], T]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
