"""Local training with user-level differential privacy: what a client gives away says little about any one user."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.config import TrainingConfig, UserPrivacyConfig
from pplr.errors import FederationError
from pplr.recommend.local_result import LocalResult
from pplr.stages.client_model import ClientModel
from pplr.stages.optimizer import LocalObjective

__all__ = ["Coins", "by_user", "private_steps", "train_privately"]


class Coins(Protocol):
    """The secret randomness of one round of one client: everything that is drawn in it comes from here."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Draw numbers between 0 and 1, (count,)."""

    def gaussian(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """Draw standard normal numbers of a shape."""

    def seed(self) -> int:
        """Draw a seed in [0, 2^63)."""


def private_steps(local_epochs: int, sampling_rate: float) -> int:
    """Optimizer steps that a client takes in a server round; they do not depend on its data.

    Example:
        >>> private_steps(2, 0.3)
        8
    """
    return local_epochs * math.ceil(1 / sampling_rate - 1e-9)


def by_user(encoded: Sequence[Any], owners: Sequence[int]) -> list[list[Any]]:
    """Put each user's encoded samples together, users in the order in which they first come."""
    groups: dict[int, list[Any]] = {}
    for sample, user in zip(encoded, owners, strict=True):
        groups.setdefault(user, []).append(sample)
    return list(groups.values())


def train_privately(
    model: ClientModel,
    users: Sequence[Sequence[Any]],
    config: TrainingConfig,
    private: UserPrivacyConfig,
    coins: Coins,
    *,
    client: str,
    rounds: int,
    objective: LocalObjective | None = None,
    anchor: AdapterState | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> LocalResult:
    r"""Train a client's adapter for one server round so that no user's part in it can be told.

    In every step each user is drawn with probability q, alone. g_u is the gradient of the user's mean loss per answer
    token, over all that is trained in all stages together:

    g = (Σ_drawn g_u min(1, C / ‖g_u‖) + σ C z) / users_per_step,  z ~ N(0, I)

    A step in which nobody is drawn is a step of noise. What follows (a proximal term, the global clipping, AdamW) sees
    no data but through g. Dropout and whatever a backbone draws come from the secret coins too, so that one user's
    gradient depends on no other user.

    Args:
        model: The client's model.
        users: Each user's encoded samples.
        config: Epochs, rate; ``batch_size`` samples of a user are in memory at once, or ``micro_batch_size``.
        private: Noise, clipping, sampling.
        coins: The round's secret randomness.
        client: Its name.
        rounds: Server rounds of the whole run, for the schedule.
        objective: What is minimised besides the loss.
        anchor: The adapter that a proximal term pulls towards.
        advance: Told the number of samples done.

    Returns:
        Steps and time alone; what depends on the users without noise is ``None``.

    Raises:
        FederationError: The client has no samples, or private training is off.

    Cites:
        mcmahan2018dplm
        abadi2016dpsgd
    """
    if not users:
        raise FederationError(
            f"client {client} has no training samples", cure="Use another partition or fewer federation.clients."
        )
    if private.noise_multiplier is None:
        raise FederationError("private training without noise", cure="Set privacy.dp.noise_multiplier.")
    started = time.perf_counter()
    deviation, middle = private.noise_multiplier * private.clip_norm, not private.freeze_middle
    per_epoch = private_steps(1, private.sampling_rate)
    steps = config.local_epochs * per_epoch
    horizon = 1 if config.optimizer_state == "reset" else rounds

    def noise(shape: torch.Size) -> Tensor:
        return torch.from_numpy(deviation * coins.gaussian(shape))

    model.begin_round(steps * horizon, objective, anchor)
    try:
        for step in range(steps):
            if step % per_epoch == 0:
                model.refresh()
            drawn = coins.uniform(len(users)) < private.sampling_rate
            for own in (own for own, is_drawn in zip(users, drawn, strict=True) if is_drawn):
                _backward(model, own, config, coins)
                model.optimizer.keep_gradient(private.clip_norm, middle=middle)
                advance(len(own))
            model.optimizer.release_gradient(noise, private.users_per_step, middle=middle)
            model.optimizer_step(config.clip_norm)
    except BaseException:
        if model.transport is not None:
            model.transport.discard()
        raise
    finally:
        model.end_round()
    return LocalResult(None, steps, None, None, None, time.perf_counter() - started)


def _backward(model: ClientModel, own: Sequence[Any], config: TrainingConfig, coins: Coins) -> None:
    """Leave the gradient of one user's mean loss per answer token."""
    drawn = model.backbone.draw(own, coins.seed())
    micro = config.micro_batch_size or config.batch_size
    order = sorted(range(len(drawn)), key=lambda place: model.backbone.length(drawn[place]))
    collate = model.backbone.collate_row if config.shared_prefix else model.backbone.collate
    parts = [collate([drawn[place] for place in order[start : start + micro]]) for start in range(0, len(order), micro)]
    wanted = sum(part.targets for part in parts)
    for part in parts:
        (model.train_loss(part, coins.seed()) / wanted).backward()
