"""What tests of several rooms do and check: errors, states, steps of training, operations."""
# ruff: noqa: S101  (a contract is made of assertions)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pplr.backbones.adapters import load_adapter
from pplr.backbones.base import Batch
from pplr.errors import PplrError
from pplr.stages.client_model import ClientModel

__all__ = ["counted_operations", "refuses", "same_adapters", "same_state", "take_steps"]


@contextmanager
def refuses(kind: type[PplrError], words: str = "") -> Iterator[None]:
    """Check that what is inside raises exactly this error, with these words in it, one line and a cure."""
    seen: PplrError | None = None
    try:
        yield
    except PplrError as error:
        seen = error
    assert seen is not None, f"no {kind.__name__} was raised"
    assert type(seen) is kind, f"{type(seen).__name__} instead of {kind.__name__}: {seen}"
    assert words in str(seen), f"{words!r} is not in: {seen}"
    assert seen.cure.strip(), f"no cure: {seen}"
    assert "\n" not in str(seen), f"more than one line: {seen}"


def same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Say whether two states have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_adapters(one: Path, other: Path) -> bool:
    """Say whether two run folders end with the same clients and the same adapters, bit for bit."""
    first, second = (sorted(folder.name for folder in (run / "clients").iterdir()) for run in (one, other))
    return first == second and all(
        same_state(load_adapter(one / "clients" / name), load_adapter(other / "clients" / name)) for name in first
    )


def take_steps(model: ClientModel, batches: Sequence[Batch]) -> list[float]:
    """Take a step on each batch, with dropout, and return the loss of each."""
    told: list[float] = []
    model.begin_round(2 * len(batches))
    for number, batch in enumerate(batches):
        loss = model.train_loss(batch, number)
        (loss / batch.targets).backward()
        told.append(float(loss.detach()))
        model.optimizer_step(0.5)  # small enough to be clipped by the norm over all stages
    model.end_round()
    return told


@contextmanager
def counted_operations() -> Iterator[FlopCounterMode]:
    """Count the operations of what is inside; attention is computed by plain products, each of which counts once."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
