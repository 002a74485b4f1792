"""From histories to samples, cases and words. Training and inference use the same template, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pplr.config import PromptConfig
from pplr.data.holdout import Holdout
from pplr.errors import DataError
from pplr.seeds import generator

__all__ = [
    "Case",
    "PromptTemplate",
    "Sample",
    "draw_cases",
    "draw_samples",
    "evaluation_cases",
    "shown_title",
    "training_histories",
    "training_samples",
    "training_users",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example: what came before, and what came next.

    Args:
        user: The user's number.
        history: Item numbers, oldest first.
        target: The item number that followed.
        every: Whether each item of the history but the first is a target too.
    """

    user: int
    history: tuple[int, ...]
    target: int
    every: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One user to recommend to, and what that user really took.

    Args:
        user: The user's number.
        history: The newest item numbers before the part, oldest first.
        targets: Item numbers of the part, each once, in order of time; none of them is in ``seen``.
        seen: Every item before the part, each once, in order of time, then what the holdout masks besides: masked when
            ranking.
    """

    user: int
    history: tuple[int, ...]
    targets: tuple[int, ...]
    seen: tuple[int, ...]


def training_samples(holdout: Holdout, users: Iterable[int], history_items: int) -> list[Sample]:
    """Make a sample of every train item but each user's first, with the items before it as history.

    Args:
        holdout: Only its train part is read.
        users: User numbers, in the order wanted.
        history_items: Most items of a history; the newest are kept.

    Returns:
        Samples by user, then time. An item taken again is a target again.
    """
    samples: list[Sample] = []
    for user in users:
        items = holdout.train[user].tolist()
        for position in range(1, len(items)):
            history = tuple(items[max(0, position - history_items) : position])
            samples.append(Sample(int(user), history, items[position]))
    return samples


def training_histories(holdout: Holdout, users: Iterable[int], history_items: int) -> list[Sample]:
    """Make windows of each user's train items, in which every item but the first is a target.

    Windows are counted from the newest item backwards and share the item at their border, so every train item but a
    user's first is a target exactly once.

    Args:
        holdout: Only its train part is read.
        users: User numbers, in the order wanted.
        history_items: Most items before the last of a window.

    Returns:
        Samples by user, then time.
    """
    samples: list[Sample] = []
    for user in users:
        items = holdout.train[user].tolist()
        ends = sorted(range(len(items) - 1, 0, -history_items))
        for end in ends:
            start = max(0, end - history_items)
            samples.append(Sample(int(user), tuple(items[start:end]), items[end], every=True))
    return samples


def training_users(holdout: Holdout, users: Iterable[int]) -> list[Sample]:
    """Make one sample of each user's train items, from which targets are drawn later.

    Args:
        holdout: Only its train part is read.
        users: User numbers, in the order wanted.

    Returns:
        A sample of each user with two train items or more, which is all but the last, and the last.
    """
    whole = [(int(user), holdout.train[user].tolist()) for user in users]
    return [Sample(user, tuple(items[:-1]), items[-1], every=True) for user, items in whole if len(items) > 1]


def evaluation_cases(
    holdout: Holdout, users: Iterable[int], part: Literal["validation", "test"], history_items: int
) -> tuple[list[Case], int]:
    """Make a case of every user who has something to be recommended.

    Items of a user's past are masked when ranking, so a target that the user has taken before could never be
    recommended: it is dropped, and a target that comes twice counts once.

    Args:
        holdout: Train, validation and test.
        users: User numbers, in the order wanted.
        part: Where targets come from. The past is train, and for test validation too.
        history_items: Most items of a history; the newest are kept.

    Returns:
        The cases, and how many users are left out, which are those without a past or without a target that is left.
    """
    cases: list[Case] = []
    count = 0
    for user in users:
        count += 1
        past = holdout.history(user, part).tolist()
        seen = dict.fromkeys([*past, *holdout.not_recommended(int(user), part)])
        targets = tuple(item for item in dict.fromkeys(getattr(holdout, part)[user].tolist()) if item not in seen)
        if past and targets:
            cases.append(Case(int(user), tuple(past[-history_items:]), targets, tuple(seen)))
    return cases, count - len(cases)


def draw_samples(samples: Sequence[Sequence[Sample]], total: int | None, seed: int) -> list[list[Sample]]:
    """Draw samples over all clients, in proportion to how many each has.

    Shares are rounded by largest remainder (of equals, the first client), and a client with any sample gets at
    least one, so more than ``total`` come back only when there are more such clients.

    Args:
        samples: The samples of C clients.
        total: How many to draw, without replacement; all when ``None`` or when there are no more.
        seed: The run's seed.

    Returns:
        C lists, each in the order given. What one client gives depends on the others only by its share.
    """
    return _draw("samples", samples, total, seed)


def draw_cases(cases: Sequence[Sequence[Case]], total: int | None, seed: int) -> list[list[Case]]:
    """Draw evaluation cases over all clients by the rule of :func:`draw_samples`."""
    return _draw("cases", cases, total, seed)


class PromptTemplate:
    r"""The words around a history, in the form of Alpaca and BIGRec, with no line indented.

    Where every title is a target, a history is a list instead, a title on each line. What follows a list is its next
    line, so a prompt with its answer is the prompt of a history that is longer by one.

    Args:
        config: Instruction, noun, verb and form.

    Example:
        >>> template = PromptTemplate(PromptConfig(instruction="Recommend one of the {noun}."))
        >>> print(template.prompt(["Toy Story (1995)", 'The "Best" One']) + template.answer("Heat (1995)"))
        ### Instruction:
        Recommend one of the movies.
        <BLANKLINE>
        ### Input:
        The user has watched the following movies before: "Toy Story (1995)", "The 'Best' One"
        <BLANKLINE>
        ### Response:
        "Heat (1995)"
        <BLANKLINE>
        >>> template = PromptTemplate(PromptConfig(instruction="Recommend one of the {noun}.", targets="all"))
        >>> print(template.prompt(["Toy Story (1995)", 'The "Best" One']) + template.answer("Heat (1995)"))
        ### Instruction:
        Recommend one of the movies.
        <BLANKLINE>
        ### Input:
        The user has watched the following movies, one after the other:
        Toy Story (1995)
        The 'Best' One
        Heat (1995)
        <BLANKLINE>
    """

    def __init__(self, config: PromptConfig) -> None:
        instruction = config.instruction.replace("{noun}", config.noun).replace("{verb}", config.verb)
        self.is_list = config.targets == "all"
        how = ", one after the other:\n" if self.is_list else " before: "
        self.before = (
            f"### Instruction:\n{instruction}\n\n"
            f"### Input:\nThe user has {config.verb} the following {config.noun}{how}"
        )
        self._after = "\n\n### Response:\n"

    def prompt(self, titles: Sequence[str]) -> str:
        """Write the prompt of a history.

        Args:
            titles: Oldest first, at least one.

        Raises:
            DataError: The history is empty.
        """
        if not titles:
            raise DataError("a history of no items cannot be made a prompt", cure="Give at least one title.")
        if self.is_list:
            return self.before + "".join(self.answer(title) for title in titles)
        shown = ", ".join(f'"{shown_title(title)}"' for title in titles)
        return f"{self.before}{shown}{self._after}"

    def answer(self, title: str) -> str:
        """Write the answer that follows a prompt: a list's next line, or the title in quotes and a line's end."""
        return f"{shown_title(title)}\n" if self.is_list else f'"{shown_title(title)}"\n'


def shown_title(title: str) -> str:
    """Write a title as prompts and answers show it, so that it stays one line and its quotes close.

    Double quotes inside become single quotes, and any run of whitespace one space.

    Example:
        >>> shown_title('Ivan "Ironman" Stewart')
        "Ivan 'Ironman' Stewart"
    """
    return " ".join(title.replace('"', "'").split())


def _draw(what: str, groups: Sequence[Sequence[T]], total: int | None, seed: int) -> list[list[T]]:
    sizes = [len(group) for group in groups]
    if total is None or total >= sum(sizes):
        return [list(group) for group in groups]
    drawn: list[list[T]] = []
    for client, (group, count) in enumerate(zip(groups, _shares(sizes, total), strict=True)):
        chosen = generator(seed, "draw", what, client).permutation(len(group))[:count]
        drawn.append([group[index] for index in sorted(chosen.tolist())])
    return drawn


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Share out ``total`` in proportion to sizes, by largest remainder, with at least one for each that has any."""
    whole = sum(sizes)
    shares = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda client: (-(total * sizes[client] % whole), client))
    for client in by_remainder[: total - sum(shares)]:
        shares[client] += 1
    for client, size in enumerate(sizes):
        if size and not shares[client]:
            shares[client] = 1
            richest = max(range(len(sizes)), key=shares.__getitem__)
            shares[richest] -= shares[richest] > 1
    return shares
