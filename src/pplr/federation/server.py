"""The server of a federation whose clients are elsewhere: it knows them by name, and by what they exchange."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pplr.backbones.adapters import AdapterState
from pplr.config import Config
from pplr.errors import AdapterError, CheckpointError, FederationError
from pplr.federation.aggregation import is_mixed, mix_on_disk
from pplr.federation.checkpoints import Checkpoint, CheckpointStore
from pplr.federation.decisions import Best, Report, Trained, decide, out_of_patience, participants_of, round_record
from pplr.federation.guard import check_trained, too_large, update_norm
from pplr.federation.methods import Method, Mixing
from pplr.federation.stacks import SomeAdapters, StoredAdapters
from pplr.lazy import LazyMapping
from pplr.storage import storage_errors

__all__ = ["FederationServer"]

_WORK = ".round.tmp"
"""Beside the checkpoints; what a process that was killed has left of it is removed when the run goes on."""


@dataclass
class _Round:
    """A round that is under way: who reported what, and where the adapters lie.

    Args:
        wanted: Its participants, in the usual order.
        trained: A row for each of them.
        reports: Of those whose report passed.
        norms: Of their updates.
        refused: Why the others are left out.
        mixing: Who learned from whom, once that is decided.
        mixed: A row for each that took part in the mixing; absent when nothing is exchanged.
    """

    wanted: Sequence[str]
    trained: StoredAdapters
    reports: dict[str, Report] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    mixing: Mixing | None = None
    mixed: StoredAdapters | None = None


class FederationServer:
    """What the server's side keeps from round to round, and what it does with what clients report.

    A round is: the participants are ordered to train (:meth:`begin`, :meth:`adapter_of`), each report is checked and
    taken as it comes (:meth:`take`), all are mixed (:meth:`mix`), whose adapter changed validates it
    (:meth:`changed`), and the round is recorded and checkpointed (:meth:`finish`). Until then nothing of it is kept,
    so a round can be ordered again. Adapters lie on disk, one tensor of all clients or one client is in memory at a
    time.

    Args:
        config: The run's configuration.
        method: The federated method.
        names: All clients, in their usual order.
        initial: What all clients exchange, as they start; without private tensors.
        store: Where checkpoints go, and beside them what is worked on.
        note: Told of every client that is left out, and why.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        names: Sequence[str],
        initial: AdapterState,
        store: CheckpointStore,
        note: Callable[[str], None],
    ) -> None:
        if method.pooled:
            raise FederationError(
                f"federation.method {method.name} pools all data in one place, which no federation does",
                cure="Use runtime.name in_process for it.",
            )
        if odd := [name for name, tensor in initial.items() if tensor.dtype != torch.float32]:
            raise FederationError(
                f"{odd[0]} is {initial[odd[0]].dtype}, and adapters are float32", cure="Use the same version of pplr."
            )
        self.config = config
        self.method = method
        self.names = tuple(names)
        self.initial = initial
        self.next_round = 0
        self.records: list[dict[str, Any]] = []
        self.best: dict[str, Best] = {}
        self._standing: Checkpoint | None = None  # of the last whole round; None for the start
        self._round: _Round | None = None
        self._store = store
        self._work = store.folder / _WORK
        self._note = note

    def restore(self) -> bool:
        """Go to where the newest checkpoint was written, if there is one.

        Raises:
            CheckpointError: It is of another federation, or damaged like all before it.
        """
        checkpoint = self._store.newest()
        if checkpoint is None:
            return False
        try:
            for name in self.names:
                if not (path := checkpoint.path(f"client-{name}")).exists():
                    raise FileNotFoundError(path.name)
            self.best = {str(k): Best(int(v[0]), v[1]) for k, v in checkpoint.state["best"].items()}
            self.records = list(checkpoint.state["records"])
            self.next_round = int(checkpoint.state["next_round"])
        except (KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} is of another federation: it lacks {error}",
                cure="Resume with the configuration and the clients that wrote it.",
            ) from error
        self._standing, self._round = checkpoint, None
        return True

    @property
    def is_finished(self) -> bool:
        """Whether no round is left, or no client has improved for long enough."""
        if self.next_round >= self.config.federation.rounds:
            return True
        return out_of_patience(self.best, self.next_round, self.config.federation.patience)

    def participants(self) -> list[str]:
        """Name the clients that train in the next round."""
        return participants_of(self.names, self.next_round, self.config)

    def adapter_of(self, name: str) -> AdapterState:
        """Read what a client goes on with: its own adapter of the last mixing, or of this round's once mixed."""
        now = self._round
        if now is None or now.mixing is None:
            return self._before(name)
        if name in now.reports:
            if now.mixed is None:
                return now.trained.get(now.wanted.index(name))
            return now.mixed.get(list(now.reports).index(name))
        if now.mixed is None or not self.method.shared:
            return self._before(name)
        before, average = self._before(name), now.mixed.get(0)
        averaging = self.config.federation.averaging
        return {key: (average if is_mixed(key, averaging) else before)[key] for key in self.initial}

    def _before(self, name: str) -> AdapterState:
        """Read what a client went into the round with."""
        return self.initial if self._standing is None else self._standing.tensors(f"client-{name}")

    # -- a round ------------------------------------------------------------------------------------------------

    def begin(self) -> list[str]:
        """Begin the next round, for the first time or again.

        Returns:
            Who is to train.

        Raises:
            StorageError: The disk refuses.
        """
        wanted = self.participants()
        with storage_errors(self._work):
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(parents=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.initial.items()}
        self._round = _Round(wanted, StoredAdapters.create(self._work / "trained", shapes, len(wanted)))
        return wanted

    def take(self, name: str, trained: Trained) -> None:
        """Check what a participant trained; one that does not pass, or is taken already, is left out and told of."""
        now = self._under_way()
        if name not in now.wanted or name in now.reports:
            self._note(f"client {name} reports a training that nobody waits for: passed over")
            return
        try:
            check_trained(trained, self.initial, whose=f"client {name}'s adapter")
        except (AdapterError, FederationError) as error:
            now.refused[name] = str(error)
            return
        now.trained.put(now.wanted.index(name), trained.adapter)
        now.norms[name] = update_norm(trained.adapter, self._before(name))
        now.reports[name] = Report(trained.result, trained.samples)
        now.refused.pop(name, None)

    def mix(self) -> None:
        """Leave out what is too large among what was taken, and mix the rest.

        Raises:
            FederationError: Too few reports are left; nothing was changed, and the round can be ordered again.
            StorageError: The disk refuses.
        """
        now = self._under_way()
        now.refused |= too_large(now.norms, self.config.federation.norm_factor)
        passed = [name for name in now.wanted if name in now.reports and name not in now.refused]
        for name in now.wanted:
            if name not in passed:
                reason = now.refused.get(name, "it did not answer")
                self._note(f"server round {self.next_round + 1} goes on without client {name}: {reason}")
        if len(passed) < (fewest := min(self.config.federation.fewest, len(now.wanted))):
            raise FederationError(
                f"server round {self.next_round + 1} has {len(passed)} usable updates of {len(now.wanted)}, and "
                f"federation.fewest is {fewest}",
                cure="See to the clients named above, then go on with --resume.",
            )
        now.reports = {name: now.reports[name] for name in passed}
        stack = SomeAdapters(now.trained, [now.wanted.index(name) for name in passed])
        mixing = decide(self.method, self.next_round, self.initial, list(now.reports.values()), stack)
        if mixing.weights is not None:
            now.mixed = StoredAdapters.create(self._work / "mixed", stack.shapes, len(stack))
            mix_on_disk(stack, mixing.weights, now.mixed, averaging=self.config.federation.averaging)
        now.mixing = mixing

    def changed(self) -> list[str]:
        """Name the clients whose serving model changed in this round: they validate."""
        now = self._under_way()
        if self.method.shared and not self.method.personal and now.mixed is not None:
            return list(self.names)
        return list(now.reports)

    def finish(
        self,
        validation: Mapping[str, Mapping[str, float | None]],
        improved: Sequence[str],
        more: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Record and checkpoint the round.

        Args:
            validation: What each client that answered measured.
            improved: Clients for which this is the best round so far.
            more: Further fields of the record, each with the values of clients that trained.

        Returns:
            The record, as in ``rounds.jsonl``.
        """
        now = self._under_way()
        if now.mixing is None:
            raise FederationError("no round was mixed", cure="Call mix before finish.")
        server_round, metric = self.next_round, self.config.evaluation.validation_metric
        record = round_record(server_round, now.reports, now.mixing, validation)
        for key, own in more.items():
            for name, value in own.items():
                if name in now.reports:
                    record["clients"][name][key] = value
        for name in improved:
            self.best[name] = Best(server_round, validation[name].get(metric))
        self.records.append(record)
        self.next_round += 1
        standing = {
            "next_round": self.next_round,
            "records": self.records,
            "best": {name: [best.server_round, best.score] for name, best in self.best.items()},
        }
        kept = LazyMapping([] if self.method.personal else improved, self.adapter_of)
        every = LazyMapping(self.names, self.adapter_of)
        self._standing = self._store.write(server_round, standing, every, kept)
        self._round = None
        shutil.rmtree(self._work, ignore_errors=True)
        return record

    def _under_way(self) -> _Round:
        if self._round is None:
            raise FederationError("no round has begun", cure="Call begin first.")
        return self._round
