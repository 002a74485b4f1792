"""What is told of local training; a module of its own, since a federation's server reads it and trains nothing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LocalResult"]


@dataclass(frozen=True)
class LocalResult:
    """What one round of local training did; ``None`` where it was private and a figure would tell of the users.

    Args:
        samples: Samples seen, each epoch anew.
        steps: Optimizer steps.
        tokens: Tokens through the model, without padding.
        targets: Answer tokens.
        loss: Mean loss per answer token over the round, in nats.
        seconds: Wall-clock time.
    """

    samples: int | None
    steps: int
    tokens: int | None
    targets: int | None
    loss: float | None
    seconds: float
