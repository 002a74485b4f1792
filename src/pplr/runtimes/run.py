"""A run folder: what it holds, and what can be asked of it when it is finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pplr.config import Config
from pplr.config_files import load_config
from pplr.errors import ConfigError, RunError, nearest
from pplr.progress import Progress, Silent
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.recommending import (
    Recommendation,
    UserList,
    best_items,
    check_finished,
    make_request,
    recommend_all,
    saved_adapter,
)

if TYPE_CHECKING:
    from pplr.recommend.evaluation import Evaluation
    from pplr.runtimes.assembly import Assembly
    from pplr.runtimes.audit_settings import AuditWords

__all__ = ["OWN", "SECRETS", "Recommendation", "Run", "UserList", "open_run"]

SECRETS = "privacy"
"""In a run folder: each client's secret, and what its users have spent."""

OWN = "client.json"
"""In the run folder of one client of a federation: whose it is, and whether a stage server hosts its middle blocks."""


class Run:
    """A run folder.

    Args:
        folder: Where it lies.
        config: The resolved configuration it was made with.
        assembly: The parts of the run, when they are loaded already.
        stage_server: Hosts the middle blocks; this process hosts them when absent.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        assembly: Assembly | None = None,
        stage_server: StageServerAt | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self._assembled = assembly
        self._stage_server = stage_server

    @property
    def own(self) -> str | None:
        """The one client whose folder this is, on its own machine; ``None`` where all clients are in it."""
        return str(self._json(OWN)["client"]) if (self.folder / OWN).exists() else None

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The content of ``metrics.json``; ``None`` while the run is not finished."""
        return self._json("metrics.json") if (self.folder / "metrics.json").exists() else None

    @property
    def provenance(self) -> dict[str, Any]:
        """The content of ``provenance.json``."""
        return self._json("provenance.json")

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """One record for each finished server round."""
        path = self.folder / "rounds.jsonl"
        if not path.exists():
            return []
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}", cure="Go on with --resume to write it again.") from None

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise RunError(f"no {name} in {self.folder}", cure="Train the run to its end with --resume.") from None
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}", cure="Go on with --resume to write it again.") from None
        return dict(content)

    def evaluation(self, part: str = "test") -> Evaluation:
        """Read each tested user's metrics.

        Args:
            part: ``test``, ``before`` (the initial adapter) or a floor's name.

        Raises:
            RunError: The run did not measure it.
        """
        from pplr.recommend.evaluation import Evaluation

        content = self._json("evaluation.json")
        if part not in content:
            raise RunError(f"{self.folder} has no evaluation {part!r}", cure=nearest(part, content))
        return Evaluation.from_dict(content[part])

    # -- asking the model -------------------------------------------------------------------------------------

    def assembly(self, progress: Progress | None = None) -> Assembly:
        """Load the data and the model, once."""
        if self._assembled is None:
            from pplr.runtimes.assembly import Assembly

            own, server = self.own, self._stage_server
            if own is not None and not self._json(OWN)["hosted"]:
                server = None  # its kit is for other runs
            secrets = self.folder / SECRETS
            self._assembled = Assembly(self.config, progress or Silent(), stage_server=server, own=own, secrets=secrets)
        return self._assembled

    def close(self) -> None:
        """Let go of the parts, and of what a stage server holds for them."""
        if self._assembled is not None:
            self._assembled.close()
            self._assembled = None

    def history_titles(self, user: str) -> list[str]:
        """Return the titles of everything a user did, oldest first."""
        return self.assembly().data.titles(user)

    def recommend(
        self,
        client: str | None = None,
        *,
        user: str | None = None,
        history: Sequence[str] | None = None,
        count: int = 10,
        progress: Progress | None = None,
    ) -> list[Recommendation]:
        """Recommend items that are not in a history, by one client's adapter.

        Args:
            client: Whose adapter; when absent the user's own client, or the only one.
            user: A user of that client. The history is everything the data knows of the user, test items too.
            history: Titles instead of a user, oldest first.
            count: Most items to return.
            progress: Told of every step.

        Returns:
            The best items first; items of one title stay in catalog order.

        Raises:
            ConfigError: Neither or both of ``user`` and ``history`` are given, or no client is named.
            UnknownItemError: No item has a title, or there is no such user; the nearest is named.
            PartitionError: There is no such client, or the user is another client's.
            RunError: The run is not finished.
        """
        if count < 1:
            raise ConfigError(f"{count} items are to be recommended", cure="Ask for at least one.")
        check_finished(self.folder)
        parts = self.assembly(progress)
        asked = make_request(parts, client, user, history)
        with parts.readers.reading(asked.client, saved_adapter(self, parts, asked.client)) as reader:
            scores = parts.ranker(reader).scores([asked.case])[0]
        return list(best_items(scores, asked.case.seen, count, parts.data.dataset.catalog))

    def recommend_all(
        self, client: str | None = None, *, count: int = 10, progress: Progress | None = None
    ) -> list[UserList]:
        """Recommend items to every user that has a history, by the adapter of the user's own client.

        Args:
            client: Only this client's users; all clients' when absent.
            count: Most items for each user.
            progress: Told of every step.

        Returns:
            What :meth:`recommend` says for each user, client by client.

        Raises:
            PartitionError: There is no such client.
            RunError: The run is not finished.
        """
        return recommend_all(self, client, count, progress or Silent())

    def audit(self, progress: Progress | None = None, **words: Unpack[AuditWords]) -> dict[str, Any]:
        """Attack what the server of this run sees, and write ``audit.json``.

        Args:
            progress: Told of every step.
            words: What is audited, and by whom: ``attacks``, ``knowledge``, ``users``, ``cuts``, ``noises``,
                ``passes``, ``pairs``, ``guards``, ``wires``, ``seed``; see
                :class:`~pplr.runtimes.audit_settings.AuditWords`.

        Returns:
            The content of ``audit.json``; its ``verdict`` says in one sentence what the server can read.

        Raises:
            ConfigError: One of the words is unknown, or the run is not cut and no cut is given.
            RunError: The run is not finished.
        """
        from pplr.runtimes.audit_settings import make_settings
        from pplr.runtimes.auditing import audit_run

        return audit_run(self, make_settings(**words), progress)

    def evaluate(self, progress: Progress | None = None) -> dict[str, Any]:
        """Measure the saved adapters again, on the run's test cases, and write ``metrics.json``."""
        from pplr.runtimes.in_process import evaluate_run

        return evaluate_run(self, progress or Silent())


def open_run(folder: str | Path, stage_server: StageServerAt | None = None) -> Run:
    """Open a run folder.

    Args:
        folder: The run's.
        stage_server: Hosts the middle blocks; this process hosts them when absent.

    Raises:
        RunError: It is not one.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise RunError(
            f"{folder} is not a run folder: it has no config.yaml", cure="Give a folder that `pplr train` made."
        )
    try:
        return Run(folder, load_config(folder / "config.yaml"), stage_server=stage_server)
    except ConfigError as error:
        raise RunError(
            f"{folder} was made with a configuration that cannot be read ({error.message})",
            cure="Use the version of pplr that made it, or mend its config.yaml.",
        ) from error
