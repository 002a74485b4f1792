"""The server of a federation whose clients are elsewhere: it knows them by name, and by what they exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pplr.backbones.adapters import AdapterState
from pplr.config import Config
from pplr.errors import AdapterError, CheckpointError, FederationError
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.client import Best
from pplr.federation.decisions import Trained, decide, mix_into, out_of_patience, participants_of, round_record
from pplr.federation.guard import check_trained, too_large
from pplr.federation.methods import Method, Mixing

__all__ = ["FederationServer"]


class FederationServer:
    """What the server's side keeps from round to round, and what it does with what clients report.

    A round is: the participants are ordered to train (:meth:`participants`, :meth:`adapter_of`), their reports are
    checked and mixed (:meth:`mix`), whose adapter changed validates it (:meth:`changed`), and the round is recorded
    and checkpointed (:meth:`finish`). Until then nothing of it is kept, so a round can be ordered again.

    Args:
        config: The run's configuration.
        method: The federated method.
        names: All clients, in their usual order.
        initial: What all clients exchange, as they start; without private tensors.
        store: Where checkpoints go.
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
        self.config = config
        self.method = method
        self.names = tuple(names)
        self.initial = initial
        self.next_round = 0
        self.records: list[dict[str, Any]] = []
        self.best: dict[str, Best] = {}
        self._adapters = dict.fromkeys(self.names, initial)
        self._mixed: dict[str, AdapterState] = {}
        self._trained: dict[str, Trained] = {}
        self._mixing: Mixing | None = None
        self._store = store
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
            self._adapters = {name: checkpoint.tensors(f"client-{name}") for name in self.names}
            self.best = {str(k): Best(int(v[0]), v[1]) for k, v in checkpoint.state["best"].items()}
            self.records = list(checkpoint.state["records"])
            self.next_round = int(checkpoint.state["next_round"])
        except (KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} is of another federation: it lacks {error}",
                cure="Resume with the configuration and the clients that wrote it.",
            ) from error
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
        """Return what a client goes on with: its own adapter of the last mixing, or of this round's once mixed."""
        return self._mixed.get(name, self._adapters[name])

    def mix(self, reports: Mapping[str, Trained]) -> None:
        """Check what the participants trained, leave out what does not pass, and mix the rest.

        Args:
            reports: Of every participant that answered.

        Raises:
            FederationError: Too few reports are left; nothing was changed, and the round can be ordered again.
        """
        self._trained, self._mixed, self._mixing = {}, {}, None
        wanted = self.participants()
        passed: dict[str, Trained] = {}
        refused: dict[str, str] = {name: "it did not answer" for name in wanted if name not in reports}
        for name in wanted:
            if name not in reports:
                continue
            try:
                check_trained(reports[name], self.initial, whose=f"client {name}'s adapter")
                passed[name] = reports[name]
            except (AdapterError, FederationError) as error:
                refused[name] = str(error)
        for name, reason in too_large(passed, self._adapters, self.config.federation.norm_factor).items():
            del passed[name]
            refused[name] = reason
        for name, reason in refused.items():
            self._note(f"server round {self.next_round + 1} goes on without client {name}: {reason}")
        if len(passed) < (fewest := min(self.config.federation.fewest, len(wanted))):
            raise FederationError(
                f"server round {self.next_round + 1} has {len(passed)} usable updates of {len(wanted)}, and "
                f"federation.fewest is {fewest}",
                cure="See to the clients named above, then go on with --resume.",
            )
        self._trained = passed
        self._mixing = decide(self.method, self.next_round, self.initial, passed)
        if self._mixing.weights is None:
            self._mixed = {name: own.adapter for name, own in passed.items()}
            return
        mixed: dict[str, AdapterState] = {}
        mix_into(
            lambda name, tensors: mixed.setdefault(name, {}).update({k: v.clone() for k, v in tensors.items()}),
            self.names,
            self.method,
            self._mixing,
            passed,
            self.config.federation.averaging,
        )
        for name, own in mixed.items():  # what is not mixed stays the client's
            before = passed[name].adapter if name in passed else self._adapters[name]
            self._mixed[name] = {key: own.get(key, before[key]) for key in self.initial}

    def changed(self) -> list[str]:
        """Name the clients whose serving model changed in this round: they validate."""
        if self.method.shared and not self.method.personal:
            return [name for name in self.names if name in self._mixed]
        return list(self._trained)

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
        if self._mixing is None:
            raise FederationError("no round was mixed", cure="Call mix before finish.")
        server_round, metric = self.next_round, self.config.evaluation.validation_metric
        record = round_record(server_round, self._trained, self._mixing, validation)
        for key, own in more.items():
            for name, value in own.items():
                if name in self._trained:
                    record["clients"][name][key] = value
        for name in improved:
            self.best[name] = Best(server_round, validation[name].get(metric))
        self._adapters |= self._mixed
        self.records.append(record)
        self.next_round += 1
        standing = {
            "next_round": self.next_round,
            "records": self.records,
            "best": {name: [best.server_round, best.score] for name, best in self.best.items()},
        }
        kept = {name: self._adapters[name] for name in improved if not self.method.personal}
        self._store.write(server_round, standing, self._adapters, kept)
        self._trained, self._mixed, self._mixing = {}, {}, None
        return record
