"""Lists of recommended items: what one is asked for, how it is read from scores, and those of all users at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pplr.data.interactions import Catalog
from pplr.data.prompts import Case
from pplr.errors import ConfigError, DataError, PartitionError, RunError, nearest
from pplr.progress import Progress

if TYPE_CHECKING:
    from pplr.backbones.adapters import AdapterState
    from pplr.runtimes.assembly import Assembly
    from pplr.runtimes.run import Run
    from pplr.stages.client_model import ClientModel

__all__ = [
    "Recommendation",
    "Request",
    "UserList",
    "best_items",
    "check_finished",
    "make_request",
    "reading",
    "recommend_all",
    "saved_adapter",
]


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Args:
        rank: From 1.
        item_id: The item's id.
        title: Its title.
        score: Higher is better; comparable within one list only.
    """

    rank: int
    item_id: str
    title: str
    score: float


@dataclass(frozen=True)
class UserList:
    """What one user is recommended.

    Args:
        client: The user's client.
        user: The user's id.
        items: The best first.
    """

    client: str
    user: str
    items: tuple[Recommendation, ...]


@dataclass(frozen=True)
class Request:
    """Whom to recommend to.

    Args:
        client: By whose adapter.
        case: The newest items of the history, and everything that is not to be recommended again.
        taken: Items of the whole history, also those that the model does not read.
    """

    client: str
    case: Case
    taken: int


def check_finished(folder: Path) -> None:
    """Refuse a run folder without clients' adapters.

    Raises:
        RunError: It holds none.
    """
    if not (folder / "clients").is_dir():
        raise RunError(f"the run in {folder} is not finished", cure="Train it to its end with --resume.")


def make_request(parts: Assembly, client: str | None, user: str | None, history: Sequence[str] | None) -> Request:
    """Find out who is meant; see :meth:`~pplr.runtimes.run.Run.recommend` for what may be left out and refused."""
    if (user is None) == (history is None):
        raise ConfigError("give either a user or a history", cure="Use --user U or --history 'A; B; C'.")
    catalog = parts.data.dataset.catalog
    names = parts.data.partition.names
    if client is not None and client not in names:
        raise PartitionError(f"the run has no client {client!r}", cure=nearest(client, names))
    number = -1
    if user is not None:
        number = parts.data.dataset.user(user)
        own = parts.data.client_of(number)
        if client is not None and client != own:
            raise PartitionError(
                f"user {user!r} is a user of client {own}, not of client {client}", cure=f"Use --client {own}."
            )
        client = own
        items = [int(item) for item in parts.data.dataset.histories[number]]
    else:
        items = [item for title in history or () for item in catalog.find(title)[:1]]
    if client is None and len(names) == 1:
        client = names[0]
    if client is None:
        raise ConfigError("no client is named", cure=f"Use --client with one of: {', '.join(names)}.")
    if not items:
        raise DataError("the history is empty", cure="Give at least one title.")
    seen = tuple(dict.fromkeys(items))
    if history is not None:  # every item of a typed title counts as seen
        seen = tuple(dict.fromkeys(item for title in history for item in catalog.find(title)))
    newest = tuple(items[-parts.config.data.history_items :])
    return Request(client, Case(number, newest, (), seen), len(items))


def saved_adapter(run: Run, parts: Assembly, client: str) -> AdapterState:
    """Read the adapter of a client of a finished run.

    Raises:
        AdapterError: It is missing, or does not fit the model.
    """
    from pplr.backbones.adapters import check_adapter, load_adapter

    adapter = load_adapter(run.folder / "clients" / client)
    check_adapter(adapter, parts.model.shapes, whose=f"the saved adapter of client {client}")
    return adapter


@contextmanager
def reading(parts: Assembly, client: str, adapter: AdapterState) -> Iterator[ClientModel]:
    """Admit a client to be recommended to, and dismiss it afterwards."""
    try:
        yield parts.admit(client, adapter, "recommend")
    finally:
        parts.dismiss(client, "recommend")


def best_items(scores: NDArray[Any], seen: Sequence[int], count: int, catalog: Catalog) -> tuple[Recommendation, ...]:
    """Read the best items that are not seen from one user's scores (N,); ties stay in catalog order."""
    own = scores.astype(np.float64)
    own[list(seen)] = -np.inf
    order = np.argsort(-own, kind="stable")[:count]
    return tuple(
        Recommendation(rank, catalog.item_ids[item], catalog.titles[item], float(own[item]))
        for rank, item in enumerate((int(i) for i in order if np.isfinite(own[i])), start=1)
    )


def recommend_all(run: Run, client: str | None, count: int, progress: Progress) -> list[UserList]:
    """Recommend to every user, by the user's own client's adapter; see :meth:`~pplr.runtimes.run.Run.recommend_all`."""
    if count < 1:
        raise ConfigError(f"{count} items are to be recommended", cure="Ask for at least one.")
    check_finished(run.folder)
    parts = run.assembly(progress)
    names = parts.data.partition.names
    if client is not None and client not in names:
        raise PartitionError(f"the run has no client {client!r}", cure=nearest(client, names))
    chosen = [name for name in names if client in (None, name)]
    return [found for name in chosen for found in _client_lists(run, parts, name, count, progress)]


def _client_lists(run: Run, parts: Assembly, client: str, count: int, progress: Progress) -> list[UserList]:
    from pplr.recommend.evaluation import scored

    data, most = parts.data, run.config.data.history_items
    adapter = saved_adapter(run, parts, client)
    cases = []
    for user in sorted(int(user) for user in data.partition.users[data.partition.names.index(client)]):
        taken = [int(item) for item in data.dataset.histories[user]]
        if taken:
            cases.append(Case(user, tuple(taken[-most:]), (), tuple(dict.fromkeys(taken))))
    found: dict[int, UserList] = {}
    with reading(parts, client, adapter) as reader:
        ranker = parts.ranker(reader)
        with progress.task(f"recommending to client {client}", len(cases), "users") as advance:
            for places, of_each in scored(ranker, cases, run.config.evaluation.batch_size):
                for case, scores in zip((cases[place] for place in places), of_each, strict=True):
                    items = best_items(scores, case.seen, count, data.dataset.catalog)
                    found[case.user] = UserList(client, data.dataset.user_ids[case.user], items)
                advance(len(places))
    return [found[case.user] for case in cases]
