"""What each client's users have spent, written down before it is spent, so that no crash takes it back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pplr.config import Config, UserPrivacyConfig
from pplr.errors import ConfigError, FederationError, RunError
from pplr.federation.decisions import participants_of
from pplr.privacy.accounting import Spending, epsilon_of
from pplr.privacy.coins import SecretCoins
from pplr.privacy.secret import client_secret, derived, secret_path
from pplr.recommend.private_training import private_steps
from pplr.storage import write_json

__all__ = ["Ledger", "coverage", "planned_epsilon", "refuse_over_budget"]


class Ledger:
    """One client's account: a file of what was booked, and beside it the secret that its randomness follows from.

    Every round is booked before it is trained. A round that is trained again from the same adapter, optimizer and data,
    as when a run was killed and goes on, draws the same randomness: it gives the same bytes, says nothing new, and is
    booked once. From anything else it draws other randomness, and is booked again.

    Args:
        folder: Where the client keeps it; made when absent.
        client: Its name.
        private: Noise, sampling, budget.
        data_sha256: Hash of the client's samples and whose they are.

    Raises:
        RunError: The ledger is damaged, or its secret is missing, damaged or open to others.
    """

    def __init__(self, folder: Path, client: str, private: UserPrivacyConfig, data_sha256: str) -> None:
        self.client = client
        self._private = private
        self._data = data_sha256
        self._path, secret = folder / f"{client}.json", secret_path(folder, client)
        self._booked = self._read() if self._path.exists() else []
        if self._booked and not secret.exists():
            raise RunError(
                f"{secret} is missing, and {self._path} says that its randomness was used",
                cure="Put it back, or train anew in another folder; what is in the ledger stays spent.",
            )
        self._secret = client_secret(folder, client)

    def _read(self) -> list[dict[str, Any]]:
        try:
            booked = json.loads(self._path.read_text(encoding="utf-8"))["booked"]
            rows = [dict(row) for row in booked]
            for row in rows:
                _spending(row)
                int(row["server_round"]), str(row["start"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"the ledger {self._path} cannot be read ({type(error).__name__})",
                cure="Put it back: without it nobody knows what was spent.",
            ) from error
        return rows

    def book(self, server_round: int, start_sha256: str, steps: int) -> SecretCoins:
        """Book a round, on disk before this returns, and give its randomness.

        Args:
            server_round: Counted from 0.
            start_sha256: Hash of the adapter and the optimizer that it starts from.
            steps: Optimizer steps.

        Raises:
            FederationError: It would bring ε above the budget; nothing is booked.
            StorageError: The disk refuses; nothing is booked.
        """
        private, what = self._private, f"{server_round}\x1f{start_sha256}\x1f{self._data}"
        if private.noise_multiplier is None:
            raise FederationError("a ledger without noise", cure="Set privacy.dp.noise_multiplier.")
        start = self._derive("start", what).hex()
        if all(row["start"] != start for row in self._booked):
            row = {
                "server_round": server_round + 1,
                "start": start,
                "steps": steps,
                "sampling_rate": private.sampling_rate,
                "noise_multiplier": private.noise_multiplier,
            }
            after = epsilon_of(map(_spending, [*self._booked, row]), private.delta)
            if private.epsilon_budget is not None and after > private.epsilon_budget:
                raise FederationError(
                    f"server round {server_round + 1} would bring client {self.client}'s ε to {after:.3f}, over "
                    f"privacy.dp.epsilon_budget {private.epsilon_budget:g} (it is {self.epsilon():.3f})",
                    cure="Stop here: what was trained so far is in the checkpoints.",
                )
            write_json(self._path, {"client": self.client, "unit": "user", "booked": [*self._booked, row]})
            self._booked.append(row)
        return SecretCoins(self._derive("coins", what))

    def epsilon(self) -> float:
        """Say what is spent by everything that is booked."""
        return epsilon_of(map(_spending, self._booked), self._private.delta)

    def check(self, trained: Iterable[int]) -> None:
        """Refuse a ledger that knows less than the run that goes on.

        Args:
            trained: Server rounds, from 1, in which the client has trained.

        Raises:
            RunError: One of them is not booked.
        """
        known = {int(row["server_round"]) for row in self._booked}
        if missing := sorted(set(trained) - known):
            raise RunError(
                f"the ledger {self._path} does not know of server round {missing[0]}, which client {self.client} has "
                "trained",
                cure="Put the newest ledger and its key back: without them nobody knows what was spent.",
            )

    def _derive(self, purpose: str, what: str) -> bytes:
        return derived(self._secret, purpose, what)


def planned_epsilon(config: Config, names: Sequence[str]) -> float:
    """Compute ε of the client that trains most often, if the run is carried out to its end.

    Args:
        config: The run's configuration.
        names: Its clients.
    """
    private = config.privacy.dp
    if private.noise_multiplier is None:
        return float("inf")
    drawn = [name for number in range(config.federation.rounds) for name in participants_of(names, number, config)]
    steps = private_steps(config.training.local_epochs, private.sampling_rate)
    most = max(drawn.count(name) for name in names)
    return epsilon_of([(steps * most, private.sampling_rate, private.noise_multiplier)], private.delta)


def refuse_over_budget(config: Config, names: Sequence[str]) -> str:
    """Refuse a run that would end over its budget before it begins; say what it will spend.

    Raises:
        ConfigError: It would.
    """
    private, planned = config.privacy.dp, planned_epsilon(config, names)
    if private.epsilon_budget is not None and planned > private.epsilon_budget:
        raise ConfigError(
            f"{config.federation.rounds} server rounds would spend ε = {planned:.3f}, over privacy.dp.epsilon_budget "
            f"{private.epsilon_budget:g}",
            cure="Raise privacy.dp.noise_multiplier, or lower federation.rounds or privacy.dp.sampling_rate.",
        )
    steps = private_steps(config.training.local_epochs, private.sampling_rate)
    return (
        f"private training: {steps} steps a round, each on users drawn at a rate of {private.sampling_rate:g}, who "
        f"are passed through one at a time; at its end ε = {planned:.3f} at δ = {private.delta:g}"
    )


def coverage(*, personal: bool) -> str:
    """Say what ε covers and what it does not, to stand beside every ε that is told.

    Args:
        personal: Whether clients keep a personal adapter besides the one that they exchange.
    """
    saved = "not the personal adapters that are saved" if personal else "the saved ones among them"
    return (
        f"ε covers the adapters that clients exchange, {saved}. It does not cover hidden states and gradients that "
        "cross the cut, what is measured on users (validation and test), times and sizes."
    )


def _spending(row: dict[str, Any]) -> Spending:
    return int(row["steps"]), float(row["sampling_rate"]), float(row["noise_multiplier"])
