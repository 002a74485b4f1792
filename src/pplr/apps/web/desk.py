"""What visitors of the page ask of a run. They share one model, which answers one of them at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from pplr.apps.web.completion import Completion
from pplr.errors import UnknownItemError
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.run import open_run

if TYPE_CHECKING:
    from pplr.runtimes.explaining import Answer, Explainer, ReadBack
    from pplr.runtimes.recommending import Recommendation, Request

__all__ = ["Desk"]


class Desk:
    """Holds a finished run for everybody who asks. Each method may be called from any thread, and may take long.

    Args:
        folder: The run's.
        stage_server: Hosts the middle blocks; this process hosts them when absent.
    """

    COUNT = 10

    def __init__(self, folder: Path, stage_server: StageServerAt | None = None) -> None:
        self.folder = folder
        self._run = open_run(folder, stage_server)
        self._lock = Lock()
        self._loaded: Explainer | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the data and the model are loaded."""
        return self._loaded is not None

    def load(self) -> None:
        """Load the data and the model, once.

        Raises:
            RunError: The run is not finished.
        """
        with self._lock:
            self._explainer()

    def close(self) -> None:
        """Let go of the run."""
        with self._lock, closing(self._run):
            self._loaded = None

    def _explainer(self) -> Explainer:
        if self._loaded is None:
            from pplr.runtimes.explaining import Explainer

            self._loaded = Explainer(self._run)
        return self._loaded

    # -- what can be asked for; only once it is loaded --------------------------------------------------------

    @cached_property
    def clients(self) -> Mapping[str, str]:
        """Each client's name, with what it is called and how many users it has."""
        partition = self._explainer().parts.data.partition
        return {
            name: f"{name}: {label}, {len(users):,} users"
            for name, label, users in zip(partition.names, partition.labels, partition.users, strict=True)
        }

    @cached_property
    def _users(self) -> dict[str, Completion]:
        data = self._explainer().parts.data
        return {
            name: Completion(data.dataset.user_ids[user] for user in users if len(data.dataset.histories[user]))
            for name, users in zip(data.partition.names, data.partition.users, strict=True)
        }

    @cached_property
    def _titles(self) -> Completion:
        return Completion(self._explainer().catalog.titles)

    def is_user(self, client: str, user: str) -> bool:
        """Whether a user is this client's and has a history."""
        return user in self._users[client]

    def complete_user(self, client: str, typed: str) -> list[str]:
        """List users of a client."""
        return self._users[client].of(typed)

    def complete_title(self, typed: str) -> list[str]:
        """List titles of the catalog."""
        return self._titles.of(typed) if typed.strip() else []

    def titles_of(self, typed: str) -> list[str]:
        """Take what was typed for a title, or for several with ``;`` between them, as the catalog writes them.

        Raises:
            UnknownItemError: There is no such title; the nearest is named.
        """
        catalog = self._explainer().catalog
        try:
            return [catalog.titles[catalog.find(typed)[0]]]
        except UnknownItemError:
            parts = [part.strip() for part in typed.split(";") if part.strip()]
            if len(parts) < 2:
                raise
            return [catalog.titles[catalog.find(part)[0]] for part in parts]

    # -- answers ----------------------------------------------------------------------------------------------

    def request(self, client: str, user: str | None, history: Sequence[str] | None) -> Request:
        """Find out who is meant, which waits for nobody.

        Raises:
            UnknownItemError: There is no such user or title.
            PartitionError: The user is another client's.
            DataError: The history is empty.
        """
        return self._explainer().request(client, user=user, history=history)

    def after(self, request: Request) -> Answer:
        """Recommend by the client's own adapter."""
        with self._lock:
            return self._explainer().after(request, self.COUNT)

    def before(self, request: Request) -> tuple[str, Answer]:
        """Recommend by what the client had before federation, and say what that is."""
        with self._lock:
            return self._explainer().before(request, self.COUNT)

    def popular(self, request: Request) -> tuple[Recommendation, ...]:
        """List what is popular."""
        with self._lock:
            return self._explainer().popular(request, self.COUNT)

    def read_back(self, request: Request, answer: Answer) -> ReadBack | str:
        """Attack what crossed for it."""
        with self._lock:
            return self._explainer().read_back(request, answer)

    @property
    def attacks_long(self) -> bool:
        """Whether an attack takes so long that it waits to be asked for."""
        return self._explainer().attacks_long

    @property
    def nearness(self) -> str:
        """Say between what the similarity of two items is measured."""
        return self._explainer().nearness

    @property
    def method(self) -> str:
        """The federated method of the run."""
        return self._run.config.federation.method

    @property
    def is_audited(self) -> bool:
        """Whether `pplr audit` has attacks for this run."""
        config = self._run.config
        return config.cut is not None and config.backbone.name != "encoder"

    def titles(self, request: Request) -> list[str]:
        """List the titles of the history that the model reads, oldest first."""
        return [self._explainer().catalog.titles[item] for item in request.case.history]

    @property
    def is_remote(self) -> bool:
        """Whether a stage server hosts the middle blocks."""
        return self._explainer().parts.is_remote
