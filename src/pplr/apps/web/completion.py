"""Completion of what a visitor types, done here so that no browser has to hold the whole catalog."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Completion"]


class Completion:
    """Texts of a kind, looked up by what is typed of them.

    Args:
        texts: What can be meant; of equal ones the first is kept.

    Example:
        >>> Completion(["Heat (1995)", "Wheat", "Red Heat"]).of("heat")
        ['Heat (1995)', 'Red Heat', 'Wheat']
        >>> "Wheat" in Completion(["Wheat"]), "wheat" in Completion(["Wheat"])
        (True, False)
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = [(_folded(text), text) for text in dict.fromkeys(texts)]

    def __contains__(self, text: str) -> bool:
        """Whether this very text is among them."""
        return any(text == own for _, own in self._texts)

    def of(self, typed: str, most: int = 8) -> list[str]:
        """List what may be meant: texts that begin so, then those with a word that does, then those that hold it.

        Args:
            typed: Case and runs of spaces do not matter.
            most: How many at most.
        """
        wanted = _folded(typed)
        groups: tuple[list[str], list[str], list[str]] = ([], [], [])
        for folded, text in self._texts:
            at = folded.find(wanted)
            if at < 0:
                continue
            place = 0 if at == 0 else 1 if f" {wanted}" in f" {folded}" else 2
            groups[place].append(text)
            if len(groups[0]) == most:
                break
        return [text for group in groups for text in group][:most]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
