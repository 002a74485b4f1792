"""Lists of recommended items: how one is read from scores, and those of every user of a client at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pplr.data.interactions import Catalog
from pplr.errors import ConfigError, PartitionError, RunError, nearest
from pplr.progress import Progress

if TYPE_CHECKING:
    from pplr.runtimes.assembly import Assembly
    from pplr.runtimes.run import Run

__all__ = ["Recommendation", "UserList", "best_items", "recommend_all"]


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
    if not (run.folder / "clients").is_dir():
        raise RunError(f"the run in {run.folder} is not finished", cure="Train it to its end with --resume.")
    parts = run.assembly(progress)
    names = parts.data.partition.names
    if client is not None and client not in names:
        raise PartitionError(f"the run has no client {client!r}", cure=nearest(client, names))
    chosen = [name for name in names if client in (None, name)]
    return [found for name in chosen for found in _client_lists(run, parts, name, count, progress)]


def _client_lists(run: Run, parts: Assembly, client: str, count: int, progress: Progress) -> list[UserList]:
    from pplr.backbones.adapters import check_adapter, load_adapter
    from pplr.data.prompts import Case
    from pplr.recommend.evaluation import in_batches

    data, most = parts.data, run.config.data.history_items
    adapter = load_adapter(run.folder / "clients" / client)
    check_adapter(adapter, parts.model.shapes, whose=f"the saved adapter of client {client}")
    cases = []
    for user in sorted(int(user) for user in data.partition.users[data.partition.names.index(client)]):
        taken = [int(item) for item in data.dataset.histories[user]]
        if taken:
            cases.append(Case(user, tuple(taken[-most:]), (), tuple(dict.fromkeys(taken))))
    found: dict[int, UserList] = {}
    ranker = parts.ranker(parts.admit(client, adapter, "recommend"))
    try:
        with progress.task(f"recommending to client {client}", len(cases), "users") as advance:
            for places in in_batches(ranker, cases, run.config.evaluation.batch_size):
                batch = [cases[place] for place in places]
                for case, scores in zip(batch, ranker.scores(batch), strict=True):
                    items = best_items(scores, case.seen, count, data.dataset.catalog)
                    found[case.user] = UserList(client, data.dataset.user_ids[case.user], items)
                advance(len(batch))
    finally:
        parts.dismiss(client, "recommend")
    return [found[case.user] for case in cases]
