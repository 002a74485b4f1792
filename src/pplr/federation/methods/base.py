"""What a federated method decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from pplr.backbones.adapters import AdapterState
from pplr.config import FederationConfig
from pplr.errors import ConfigError, nearest
from pplr.federation.stacks import Stack
from pplr.stages.optimizer import LocalObjective

__all__ = ["METHODS", "Method", "Mixing", "RoundView", "make_method", "register"]


@dataclass(frozen=True)
class RoundView:
    """What the server knows when a round's local training is over.

    Args:
        server_round: t, counted from 0.
        adapters: C adapters after local training, in memory or on disk.
        initial: The adapter that all clients started from.
        losses: (C,) mean training loss per answer token; ``None`` of a client whose training is private.
        samples: (C,) training samples; 1 of a client whose training is private.
    """

    server_round: int
    adapters: Stack | Sequence[AdapterState]
    initial: AdapterState
    losses: Sequence[float | None]
    samples: Sequence[int]


@dataclass(frozen=True)
class Mixing:
    """Who learns from whom in one round.

    Args:
        weights: W, (C, C), rows of sum 1; ``None`` when nothing is exchanged.
        similarity: S, (C, C), where the method measures it.
        loss_share: p, (C,), where the method uses it.
        heating: w, (C,), where the method uses it.
    """

    weights: NDArray[np.float64] | None
    similarity: NDArray[np.float64] | None = None
    loss_share: NDArray[np.float64] | None = None
    heating: NDArray[np.float64] | None = None


class Method(ABC):
    """A federated method.

    Attributes:
        name: The registered name.
        pooled: Whether all data is trained in one place.
        shared: Whether every client, taking part in the round or not, goes on with the same adapter.
        personal: Whether a client trains a second adapter that it never sends, and is served by it.
    """

    name: ClassVar[str]
    pooled: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    personal: ClassVar[bool] = False

    def __init__(self, config: FederationConfig) -> None:
        self.config = config

    def objective(self) -> LocalObjective:
        """What the exchanged adapter minimises besides the loss."""
        return LocalObjective(train_a=self.config.averaging != "freeze_a")

    def personal_objective(self) -> LocalObjective:
        """What the personal adapter minimises besides the loss, for methods that have one."""
        return self.objective()

    @abstractmethod
    def mixing(self, view: RoundView) -> Mixing:
        """Decide who learns from whom."""


METHODS: dict[str, type[Method]] = {}

MethodT = TypeVar("MethodT", bound=Method)


def register(method: type[MethodT]) -> type[MethodT]:
    """Register a method under its ``name``; used as a decorator."""
    METHODS[method.name] = method
    return method


def make_method(config: FederationConfig) -> Method:
    """Make the method that a configuration names.

    Raises:
        ConfigError: No method has that name; the nearest is named.
    """
    try:
        return METHODS[config.method](config)
    except KeyError:
        raise ConfigError(
            f"federation.method: no method is called {config.method!r}", cure=nearest(config.method, METHODS)
        ) from None
