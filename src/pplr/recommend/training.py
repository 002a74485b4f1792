"""Local training: one client, its own samples, one server round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pplr.backbones.adapters import AdapterState
from pplr.backbones.base import Backbone, Batch
from pplr.backbones.batching import bucketed_batches
from pplr.config import TrainingConfig
from pplr.errors import FederationError
from pplr.recommend.local_result import LocalResult
from pplr.seeds import derive_seed
from pplr.stages.client_model import ClientModel
from pplr.stages.optimizer import LocalObjective

__all__ = ["epoch_batches", "evaluation_loss", "steps_per_round", "train_locally"]


def steps_per_round(samples: int, config: TrainingConfig) -> int:
    """Optimizer steps that one client takes in one server round."""
    return config.local_epochs * math.ceil(samples / config.batch_size)


def epoch_batches(
    backbone: Backbone,
    encoded: Sequence[Any],
    config: TrainingConfig,
    client: str,
    server_round: int,
    epoch: int,
    seed: int,
) -> Iterator[list[Batch]]:
    """Give the batches of one epoch of a client's training, each as its micro-batches; they follow from the seed.

    Args:
        backbone: Collates them.
        encoded: The client's encoded samples.
        config: Batches.
        client: Its name.
        server_round: Counted from 0.
        epoch: Of the round, counted from 0.
        seed: The run's seed.
    """
    collate = backbone.collate_row if config.shared_prefix else backbone.collate
    drawn = backbone.draw(encoded, derive_seed(seed, "draw", client, server_round, epoch))
    lengths = [backbone.length(sample) for sample in drawn]
    for positions in bucketed_batches(lengths, config.batch_size, seed, client, server_round, epoch):
        micro = config.micro_batch_size or len(positions)
        yield [
            collate([drawn[i] for i in positions[start : start + micro]]) for start in range(0, len(positions), micro)
        ]


def train_locally(
    model: ClientModel,
    encoded: Sequence[Any],
    config: TrainingConfig,
    *,
    client: str,
    server_round: int,
    rounds: int,
    seed: int,
    objective: LocalObjective | None = None,
    anchor: AdapterState | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> LocalResult:
    """Train a client's adapter on its own samples for one server round.

    The loss of a batch is the mean over its answer tokens, however it is divided into micro-batches. The order of
    the samples and every dropout mask follow from the seed, the client, the round and the step alone.

    Args:
        model: The client's model.
        encoded: Its encoded samples.
        config: Batches, epochs, rate.
        client: Its name.
        server_round: Counted from 0.
        rounds: Server rounds of the whole run, for the schedule.
        seed: The run's seed.
        objective: What is minimised besides the loss.
        anchor: The adapter that a proximal term pulls towards.
        advance: Told the number of samples done.

    Raises:
        FederationError: The client has no samples, or its loss is not finite.
    """
    if not encoded:
        raise FederationError(
            f"client {client} has no training samples", cure="Use another partition or fewer federation.clients."
        )
    started = time.perf_counter()
    horizon = 1 if config.optimizer_state == "reset" else rounds
    model.begin_round(steps_per_round(len(encoded), config) * horizon, objective, anchor)
    samples = steps = tokens = targets = 0
    total_loss = 0.0
    try:
        for epoch in range(config.local_epochs):
            model.refresh()
            for parts in epoch_batches(model.backbone, encoded, config, client, server_round, epoch, seed):
                seeds = [derive_seed(seed, "dropout", client, server_round, steps, own) for own in range(len(parts))]
                batch_loss = sum(model.train_batch(parts, seeds))
                if not math.isfinite(batch_loss):
                    raise FederationError(
                        f"the loss of client {client} is {batch_loss} at step {steps + 1} of server round "
                        f"{server_round + 1}",
                        cure="Lower training.learning_rate or set training.clip_norm.",
                    )
                model.optimizer_step(config.clip_norm)
                total_loss += batch_loss
                targets += sum(part.targets for part in parts)
                tokens += sum(part.tokens for part in parts)
                done = sum(part.samples for part in parts)
                samples += done
                steps += 1
                advance(done)
    except BaseException:
        if model.transport is not None:
            model.transport.discard()
        raise
    finally:
        model.end_round()
    return LocalResult(samples, steps, tokens, targets, total_loss / targets, time.perf_counter() - started)


def evaluation_loss(model: ClientModel, encoded: Sequence[Any], batch_size: int) -> float | None:
    """Mean loss per answer token, in nats, without training; ``None`` when there is nothing to measure on."""
    model.refresh()
    order = sorted(range(len(encoded)), key=lambda i: model.backbone.length(encoded[i]))
    total, targets = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = model.backbone.collate([encoded[i] for i in order[start : start + batch_size]])
        total += float(model.evaluation_loss(batch))
        targets += batch.targets
    return total / targets if targets else None
