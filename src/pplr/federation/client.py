"""One client of the federation: its samples, its adapter, its own best round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from pplr.backbones.adapters import AdapterState, adapter_sha256
from pplr.config import Config
from pplr.errors import FederationError
from pplr.federation.decisions import Best
from pplr.federation.methods import Method
from pplr.recommend.local_result import LocalResult
from pplr.recommend.private_training import Coins, by_user, private_steps, train_privately
from pplr.recommend.training import train_locally
from pplr.stages.client_model import ClientModel
from pplr.stages.transport import Traffic

__all__ = ["Books", "FederatedClient", "Validate"]

_OPTIMIZER = "optimizer."
_PERSONAL = "personal."

Validate = Callable[[ClientModel], Mapping[str, float | None]]
"""Measures a client's model on its own validation cases."""


class Books(Protocol):
    """A client's account of what its users' privacy was spent on."""

    def book(self, server_round: int, start_sha256: str, steps: int) -> Coins:
        """Write down that a round is about to be trained, before it is, and give its secret randomness.

        The same round from the same start is booked once and has the same randomness; from another start it has
        another, and is booked again.

        Raises:
            FederationError: It would go over the budget.
        """

    def epsilon(self) -> float:
        """Say what is spent by everything that is booked."""


class FederatedClient:
    """A party that holds users.

    Args:
        name: Its name.
        encoded: Its encoded training samples.
        model: The model whose adapter is exchanged.
        validate: Measures the model that serves the client.
        personal: With methods such as Ditto, a second model that serves the client and whose adapter is never sent.
        owners: The user of each sample, where training is private.
        books: The account of the users' privacy; training is private where there is one.
    """

    def __init__(
        self,
        name: str,
        encoded: Sequence[Any],
        model: ClientModel,
        validate: Validate,
        personal: ClientModel | None = None,
        owners: Sequence[int] = (),
        books: Books | None = None,
    ) -> None:
        self.name = name
        self.encoded = encoded
        self.model = model
        self.personal = personal
        self.books = books
        self._owners = owners
        self.best: Best | None = None
        self._validate = validate

    @property
    def serving(self) -> ClientModel:
        """The model that the client's users are served by."""
        return self.personal or self.model

    @property
    def traffic(self) -> Traffic:
        """What crossed the cut for this client so far."""
        both = [model.traffic for model in (self.model, self.personal) if model is not None]
        return Traffic(sum(t.bytes_up for t in both), sum(t.bytes_down for t in both))

    def begin_round(self, server_round: int) -> None:
        """Enter a server round, whether or not the client trains in it: say what of its model is to be kept."""
        for model in (self.model, self.personal):
            if model is not None:
                model.settle(server_round)
                model.keeps_constants = model.backbone.keeps_constants(server_round)

    def train(self, server_round: int, config: Config, method: Method, advance: Callable[[int], None]) -> LocalResult:
        """Train on the client's own samples for one server round.

        Returns:
            The result of the exchanged adapter; with a personal model, its time and samples are added.

        Raises:
            FederationError: Training failed, or would go over the budget of the users' privacy.
        """
        self._enter(f"train {server_round}")
        objective = method.objective()
        anchor: AdapterState | None = None
        if objective.proximal_mu > 0 or self.personal is not None:
            anchor = {name: tensor.clone() for name, tensor in self.model.adapter().items()}
        shared: dict[str, Any] = {"rounds": config.federation.rounds, "advance": advance, "anchor": anchor}
        seeded: dict[str, Any] = {"server_round": server_round, "seed": config.run.seed}
        if self.books is None:
            result = train_locally(
                self.model, self.encoded, config.training, client=self.name, objective=objective, **seeded, **shared
            )
        else:
            private = config.privacy.dp
            steps = private_steps(config.training.local_epochs, private.sampling_rate)
            coins = self.books.book(server_round, self._start_sha256(), steps)
            users = by_user(self.encoded, self._owners)
            result = train_privately(
                self.model, users, config.training, private, coins, client=self.name, objective=objective, **shared
            )
        if self.personal is None:
            return result
        own = train_locally(
            self.personal,
            self.encoded,
            config.training,
            client=f"{self.name} personal",
            objective=method.personal_objective(),
            **seeded,
            **shared,
        )
        both = replace(result, seconds=result.seconds + own.seconds)
        if self.books is not None:
            return both  # what the personal adapter's training tells was not made private
        counts = {key: getattr(result, key) + getattr(own, key) for key in ("samples", "steps", "tokens", "targets")}
        return replace(both, loss=own.loss, **counts)

    def _enter(self, occasion: str) -> None:
        """Say what the next passes are for, so that a round that is done again is guarded as it was before."""
        for model in (self.model, self.personal):
            if model is not None and model.guard is not None:
                model.guard.enter(occasion)

    def _start_sha256(self) -> str:
        """Hash everything but the data that a round of the exchanged adapter follows from."""
        return adapter_sha256(self.model.adapter() | self.model.optimizer_state())

    def set_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Take mixed tensors into the exchanged adapter; tensors that are not given stay."""
        self.model.set_adapter(state)

    def state(self) -> dict[str, Tensor]:
        """Return adapters and optimizers as flat tensors: what the next round depends on."""
        flat = dict(self.model.adapter())
        flat |= {_OPTIMIZER + name: tensor for name, tensor in self.model.optimizer_state().items()}
        if self.personal is not None:
            flat |= {_PERSONAL + name: tensor for name, tensor in self.personal.adapter().items()}
            own = self.personal.optimizer_state()
            flat |= {_PERSONAL + _OPTIMIZER + name: tensor for name, tensor in own.items()}
        return {name: tensor.cpu() for name, tensor in flat.items()}

    def restore(self, flat: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned, an input stage that has settled among it."""
        for model in (self.model, self.personal):
            if model is not None:
                model.settle(-1)
        self.model.set_adapter({k: v for k, v in flat.items() if not k.startswith((_OPTIMIZER, _PERSONAL))})
        self.model.restore_optimizer(_without(flat, _OPTIMIZER))
        if self.personal is not None:
            own = _without(flat, _PERSONAL)
            self.personal.set_adapter({k: v for k, v in own.items() if not k.startswith(_OPTIMIZER)})
            self.personal.restore_optimizer(_without(own, _OPTIMIZER))

    def validate(self, server_round: int, metric: str) -> tuple[Mapping[str, float | None], bool]:
        """Measure the serving model on the client's own validation cases.

        Returns:
            The metrics, and whether this round is the client's best so far. A client with nothing to validate on
            takes its newest round, and so does one whose training is private: a choice by its users' data would tell
            of them.

        Raises:
            FederationError: A measured value is not finite.
        """
        self._enter(f"validate {server_round}")
        measured = self._validate(self.serving)
        for name, value in measured.items():
            if value is not None and not math.isfinite(value):
                raise FederationError(
                    f"client {self.name}'s {name} on its validation targets is {value} in server round "
                    f"{server_round + 1}",
                    cure="Lower training.learning_rate or set training.clip_norm.",
                )
        score = measured.get(metric)
        if score is None or self.best is None or self.best.score is None or self.books is not None:
            improved = True
        else:
            improved = score < self.best.score if metric == "loss" else score > self.best.score
        if improved:
            self.best = Best(server_round, score)
        return measured, improved


def _without(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}
