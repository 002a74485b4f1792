"""What the server decides in a round, by names and adapters alone: it is the same wherever the clients are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pplr.backbones.adapters import AdapterState
from pplr.config import Config
from pplr.federation.aggregation import mix
from pplr.federation.methods import Method, Mixing, RoundView
from pplr.federation.stacks import Stack, stack_of
from pplr.recommend.local_result import LocalResult
from pplr.seeds import generator

__all__ = ["Best", "Report", "Trained", "decide", "mix_into", "out_of_patience", "participants_of", "round_record"]

_TOLD = 100
"""Most clients of which the record of a round holds every pair."""
_LARGEST = 10


@dataclass(frozen=True)
class Best:
    """A client's best server round so far.

    Args:
        server_round: Counted from 0.
        score: The validation metric there; ``None`` when the client has nothing to validate on.
    """

    server_round: int
    score: float | None


@dataclass(frozen=True)
class Report:
    """What a client tells of its local training, besides the adapter.

    Args:
        result: How the training went.
        samples: Training samples that it holds; 1 where their number is private.
    """

    result: LocalResult
    samples: int


@dataclass(frozen=True)
class Trained(Report):
    """The same with the adapter.

    Args:
        adapter: What the client exchanges; private tensors are not in it.
    """

    adapter: AdapterState


def participants_of(names: Sequence[str], server_round: int, config: Config) -> list[str]:
    """Draw the clients that train in a round: a share of all, at least one, in their usual order."""
    count = max(1, round(config.federation.participation * len(names)))
    drawn = generator(config.run.seed, "participants", server_round).permutation(len(names))[:count]
    return [names[i] for i in sorted(int(i) for i in drawn)]


def decide(
    method: Method,
    server_round: int,
    initial: AdapterState,
    reports: Sequence[Report],
    adapters: Stack | Sequence[AdapterState],
) -> Mixing:
    """Let similarity and heating decide who learns from whom, by what clients exchange.

    Args:
        method: The federated method.
        server_round: Counted from 0.
        initial: The adapter that all clients started from.
        reports: Of every client that takes part in the mixing, in the usual order.
        adapters: What they exchange, in the same order.
    """
    shapes = stack_of(adapters).shapes
    return method.mixing(
        RoundView(
            server_round=server_round,
            adapters=adapters,
            initial={name: tensor for name, tensor in initial.items() if name in shapes},
            losses=[own.result.loss for own in reports],
            samples=[own.samples for own in reports],
        )
    )


def mix_into(
    give: Callable[[str, AdapterState], None],
    names: Sequence[str],
    method: Method,
    mixing: Mixing,
    trained: Mapping[str, Trained],
    averaging: str,
) -> None:
    """Mix all adapters from one snapshot, and give every client its own, a block at a time.

    Args:
        give: Takes a client's name and some of its mixed tensors.
        names: All clients; those that did not train get tensors where the method shares one adapter.
        method: The federated method.
        mixing: What :func:`decide` returned.
        trained: What it was decided by.
        averaging: How LoRA's factors are mixed.
    """
    if mixing.weights is None:
        return
    for block in mix([own.adapter for own in trained.values()], mixing.weights, averaging=averaging):
        for name, tensors in zip(trained, block, strict=True):
            give(name, tensors)
        if method.shared:
            for name in names:
                if name not in trained:
                    give(name, block[0])


def out_of_patience(best: Mapping[str, Best], next_round: int, patience: int | None) -> bool:
    """Whether no client that can validate has improved for ``patience`` rounds."""
    improved = [own.server_round for own in best.values() if own.score is not None]
    if patience is None or not improved:
        return False
    return next_round - 1 - max(improved) >= patience


def round_record(
    server_round: int,
    trained: Mapping[str, Report],
    mixing: Mixing,
    validation: Mapping[str, Mapping[str, float | None]],
) -> dict[str, Any]:
    """Write down who trained, how well, and who learned from whom, as a line of ``rounds.jsonl``.

    With more than a hundred clients every pair of them would be millions of numbers: then a client's record names the
    ten from whom it took most, and itself, and similarities are left out.

    Args:
        server_round: Counted from 0.
        trained: Of every client that took part in the mixing, in the usual order.
        mixing: Who learned from whom.
        validation: What clients measured; of one that did not answer, nothing.
    """
    clients: dict[str, dict[str, Any]] = {}
    names = list(trained)
    for i, (name, own) in enumerate(trained.items()):
        row = {name: 1.0}
        if mixing.weights is not None:
            row = {names[j]: float(mixing.weights[i, j]) for j in _told_of(mixing.weights[i], i)}
        clients[name] = {
            "samples": own.result.samples,
            "tokens": own.result.tokens,
            "loss": own.result.loss,
            "loss_share": None if mixing.loss_share is None else float(mixing.loss_share[i]),
            "heating_weight": None if mixing.heating is None else float(mixing.heating[i]),
            "mixed_from": row,
            "validation": dict(validation.get(name, {})),
            "seconds": own.result.seconds,
        }
    for name, measured in validation.items():
        clients.setdefault(name, {"samples": 0, "validation": dict(measured)})
    alike = None if mixing.similarity is None or len(names) > _TOLD else mixing.similarity.tolist()
    return {"server_round": server_round + 1, "similarity": alike, "clients": clients}


def _told_of(weights: NDArray[np.float64], own: int) -> list[int]:
    """Say of whose part in a client's mixture the record tells."""
    if len(weights) <= _TOLD:
        return list(range(len(weights)))
    largest = np.argsort(-weights, kind="stable")[:_LARGEST]
    return sorted({own, *(int(place) for place in largest)})
