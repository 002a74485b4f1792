"""Which users, or which of their interactions, are trained on and which are left out.

Trainings come in pairs, and each unit (a user, or one interaction) is in one training of a pair, at random, and left
out of the other. So members and non-members are of one kind, and neither time nor popularity tells them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pplr.data.prompts import Case, Sample
from pplr.errors import ConfigError
from pplr.seeds import generator

__all__ = ["Unit", "draw_halves", "interactions_of", "leave_out", "samples_without", "users_of"]

_SHARE = 5
"""Of this many interactions of a user at most one is tried, so that what is left is still that user's history."""


@dataclass(frozen=True)
class Unit:
    """What is in or left out.

    Args:
        client: Whose it is.
        user: The user.
        samples: What the attacker takes the loss of.
        cases: What the outsider sees lists for.
        item: The item that the user took; ``None`` for the user as a whole.
    """

    client: str
    user: int
    samples: tuple[Sample, ...]
    cases: tuple[Case, ...]
    item: int | None = None


def users_of(samples: Mapping[str, Sequence[Sample]], lists: int, history_items: int, seed: int) -> list[Unit]:
    """Make a unit of every user with a training sample.

    Args:
        samples: Of each client.
        lists: Most lists that are looked at, for places of the user's history drawn at random.
        history_items: Most items of a history that a list is made for.
        seed: Of the draw.
    """
    units = []
    for client, user, own in _by_user(samples):
        taken = _taken(own)
        places = generator(seed, "membership", "user", user).permutation(len(taken))[:lists]
        chosen = [taken[place] for place in sorted(places.tolist())]
        cases = tuple(_case(user, history, item, history_items) for history, item in chosen)
        units.append(Unit(client, user, tuple(own), cases))
    return units


def interactions_of(samples: Mapping[str, Sequence[Sample]], most: int, history_items: int, seed: int) -> list[Unit]:
    """Make units of interactions drawn of each user.

    Args:
        samples: Of each client.
        most: Most interactions of a user; no more than a fifth of those that it is trained to predict.
        history_items: Most items of a history that is read.
        seed: Of the draw.

    Raises:
        ConfigError: No user has enough of them.
    """
    units = []
    for client, user, own in _by_user(samples):
        histories = {item: history for history, item in reversed(_taken(own))}  # of an item taken again, the first
        count = min(most, len(histories) // _SHARE)
        drawn = generator(seed, "membership", "interaction", user).permutation(sorted(histories))[:count]
        for item in sorted(drawn.tolist()):
            sample = Sample(user, histories[item], item)
            units.append(Unit(client, user, (sample,), (_case(user, histories[item], item, history_items),), item))
    if not units:
        raise ConfigError(
            f"no user has {_SHARE} training targets or more, so no interaction can be left out",
            cure="Set training.samples: null, or audit users.",
        )
    return units


def _by_user(samples: Mapping[str, Sequence[Sample]]) -> list[tuple[str, int, list[Sample]]]:
    found: dict[tuple[str, int], list[Sample]] = {}
    for client, every in samples.items():
        for own in every:
            found.setdefault((client, own.user), []).append(own)
    return [(client, user, own) for (client, user), own in found.items()]


def _taken(samples: Sequence[Sample]) -> list[tuple[tuple[int, ...], int]]:
    """List what samples train on: a history and the item that followed."""
    found = []
    for own in samples:
        items = (*own.history, own.target)
        places = range(1, len(items)) if own.every else [len(items) - 1]
        found += [(items[:place], items[place]) for place in places]
    return found


def _case(user: int, history: tuple[int, ...], item: int, history_items: int) -> Case:
    return Case(user, history[-history_items:], (item,), tuple(dict.fromkeys(history)))


def draw_halves(groups: Sequence[str], pairs: int, seed: int) -> NDArray[np.bool_]:
    """Draw who is trained on: in each pair of trainings one half of each group, then the other half.

    Args:
        groups: (M,) the group of each unit, such as its client.
        pairs: P.
        seed: Of the draw.

    Returns:
        (2 P, M); trainings 2 p and 2 p + 1 are a pair.

    Raises:
        ConfigError: A group has one unit alone.
    """
    names = np.array(groups, dtype=object)
    included = np.zeros((2 * pairs, len(groups)), dtype=np.bool_)
    for group in dict.fromkeys(groups):
        own = np.flatnonzero(names == group)
        if len(own) < 2:
            raise ConfigError(
                f"{group} has a single user or interaction, which cannot be in and left out at once",
                cure="Use fewer federation.clients, or another partition.",
            )
        for pair in range(pairs):
            shuffled = generator(seed, "members", group, pair).permutation(own)
            first, second = shuffled[: len(own) // 2], shuffled[len(own) // 2 :]
            included[2 * pair, first] = included[2 * pair + 1, second] = True
    return included


def leave_out(samples: Sequence[Sample], left_out: Collection[tuple[int, int]]) -> list[Sample]:
    """Take interactions out of training samples, as a target and out of every history.

    Args:
        samples: Of any users.
        left_out: Users and the items that they shall not have taken.

    Returns:
        The samples in their order, without those of which nothing to predict is left.
    """
    kept = []
    for own in samples:
        is_out = [(own.user, item) in left_out for item in (*own.history, own.target)]
        items = [item for item, out in zip((*own.history, own.target), is_out, strict=True) if not out]
        if len(items) > 1 and (own.every or not is_out[-1]):
            kept.append(Sample(own.user, tuple(items[:-1]), items[-1], own.every))
    return kept


def samples_without(
    samples: Mapping[str, Sequence[Sample]], units: Sequence[Unit], included: NDArray[np.bool_]
) -> dict[str, list[Sample]]:
    """Say what each client trains on.

    Args:
        samples: Of each client.
        units: M units.
        included: (M,) which of them are in.
    """
    out = [own for own, is_in in zip(units, included, strict=True) if not is_in]
    users = {own.user for own in out if own.item is None}
    items = {(own.user, own.item) for own in out if own.item is not None}
    return {
        client: leave_out([own for own in every if own.user not in users], items) for client, every in samples.items()
    }
