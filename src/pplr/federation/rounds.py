"""The server rounds, as one visible loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save

from pplr.backbones.adapters import AdapterState, check_adapter
from pplr.config import Config
from pplr.errors import CheckpointError
from pplr.federation.aggregation import mix
from pplr.federation.checkpoints import Checkpoint, CheckpointStore
from pplr.federation.client import Best, FederatedClient
from pplr.federation.methods import Method, Mixing, RoundView
from pplr.progress import Progress
from pplr.recommend.training import LocalResult
from pplr.seeds import generator
from pplr.storage import write_atomic

__all__ = ["Federation", "participants_of", "restore_checkpoint", "run_rounds", "write_checkpoint"]

_OPTIMIZER = "optimizer."
_PERSONAL = "personal."


@dataclass
class Federation:
    """The parties and where they stand.

    Args:
        clients: All clients, in the order of their names.
        method: Who learns from whom.
        initial: The adapter that all clients started from.
        next_round: The server round to carry out next, from 0.
        records: One for each finished round, as in ``rounds.jsonl``.
    """

    clients: Sequence[FederatedClient]
    method: Method
    initial: AdapterState
    next_round: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)


def participants_of(clients: Sequence[FederatedClient], server_round: int, config: Config) -> list[FederatedClient]:
    """Draw the clients that train in a round: a share of all, at least one, in their usual order."""
    count = max(1, round(config.federation.participation * len(clients)))
    drawn = generator(config.run.seed, "participants", server_round).permutation(len(clients))[:count]
    return [clients[i] for i in sorted(int(i) for i in drawn)]


def run_rounds(
    federation: Federation, config: Config, store: CheckpointStore, progress: Progress, folder: Path
) -> None:
    """Carry out the server rounds that are left.

    Args:
        federation: The parties; changed in place.
        config: The run's configuration.
        store: Where checkpoints go.
        progress: Told of every step.
        folder: The run folder, for adapters that are kept with ``run.keep_rounds``.

    Raises:
        FederationError: A client cannot train.
        AdapterError: A client's adapter is not finite.
        StorageError: A checkpoint cannot be written.
    """
    method = federation.method
    while federation.next_round < config.federation.rounds and not _out_of_patience(federation, config):
        server_round = federation.next_round
        _begin_round(federation, server_round, store)
        participants = participants_of(federation.clients, server_round, config)
        crossed = {client.name: client.traffic for client in participants}

        # 1. Every participant trains its own adapter on its own samples.
        results: dict[str, LocalResult] = {}
        for client in participants:
            epochs = config.training.local_epochs * (2 if method.personal else 1)
            label = f"server round {server_round + 1}, client {client.name}"
            with progress.task(label, epochs * len(client.encoded), "samples") as advance:
                results[client.name] = client.train(server_round, config, method, advance)
        adapters = [client.model.adapter() for client in participants]
        shapes = {name: tuple(tensor.shape) for name, tensor in federation.initial.items()}
        for client, adapter in zip(participants, adapters, strict=True):
            check_adapter(adapter, shapes, whose=f"client {client.name}'s adapter")
            if client.personal is not None:
                check_adapter(client.personal.adapter(), shapes, whose=f"client {client.name}'s personal adapter")
        _keep(federation, config, folder, server_round, "local")

        # 2. Similarity and heating decide who learns from whom, by what clients exchange.
        private = participants[0].model.backbone.private
        adapters = [_without_private(adapter, private) for adapter in adapters]
        mixing = method.mixing(
            RoundView(
                server_round=server_round,
                adapters=adapters,
                initial=_without_private(federation.initial, private),
                losses=[results[client.name].loss for client in participants],
                samples=[len(client.encoded) for client in participants],
            )
        )

        # 3. All adapters are mixed from one snapshot.
        if mixing.weights is not None:
            for layer in mix(adapters, mixing.weights, averaging=config.federation.averaging):
                for client, tensors in zip(participants, layer, strict=True):
                    client.set_adapter(tensors)
                if method.shared:
                    for client in federation.clients:
                        if client not in participants:
                            client.set_adapter(layer[0])
        _keep(federation, config, folder, server_round, "mixed")

        # 4. Every client whose adapter changed measures it, and remembers its best round.
        changed = federation.clients if method.shared and not method.personal else participants
        validation, improved = {}, {}
        with progress.task(f"server round {server_round + 1}, validation", len(changed), "clients") as advance:
            for client in changed:
                validation[client.name], better = client.validate(server_round, config.evaluation.validation_metric)
                if better:
                    improved[client.name] = client.serving.adapter()
                advance(1)

        # 5. The round is recorded and checkpointed.
        record = _record(server_round, participants, results, mixing, validation)
        for client in participants:
            traffic = client.traffic.since(crossed[client.name])
            record["clients"][client.name] |= {"bytes_up": traffic.bytes_up, "bytes_down": traffic.bytes_down}
        federation.records.append(record)
        federation.next_round += 1
        write_checkpoint(federation, store, improved)
        progress.server_round(record)


def _begin_round(federation: Federation, server_round: int, store: CheckpointStore) -> None:
    """Let every client enter a round; where a phase begins that keeps constants, from its own best round."""
    for client in federation.clients:
        client.begin_round(server_round)
    backbone = federation.clients[0].model.backbone
    if server_round == 0 or backbone.keeps_constants(server_round - 1) or not backbone.keeps_constants(server_round):
        return
    checkpoint = store.newest()
    for client in federation.clients:
        if checkpoint is not None and client.best is not None:
            client.serving.set_adapter(checkpoint.tensors(f"best-{client.name}"))


def _without_private(state: AdapterState, private: frozenset[str]) -> AdapterState:
    """Leave out what never leaves a client."""
    return {name: tensor for name, tensor in state.items() if name not in private}


def _out_of_patience(federation: Federation, config: Config) -> bool:
    """Whether no client that can validate has improved for ``patience`` rounds."""
    patience = config.federation.patience
    standing = [client.best for client in federation.clients if client.best is not None]
    improved = [best.server_round for best in standing if best.score is not None]
    if patience is None or not improved:
        return False
    return federation.next_round - 1 - max(improved) >= patience


def _record(
    server_round: int,
    participants: Sequence[FederatedClient],
    results: dict[str, LocalResult],
    mixing: Mixing,
    validation: dict[str, Any],
) -> dict[str, Any]:
    """Write down who trained, how well, and who learned from whom."""
    clients: dict[str, dict[str, Any]] = {}
    for i, client in enumerate(participants):
        result = results[client.name]
        row = {client.name: 1.0}
        if mixing.weights is not None:
            row = {other.name: float(mixing.weights[i, j]) for j, other in enumerate(participants)}
        clients[client.name] = {
            "samples": result.samples,
            "tokens": result.tokens,
            "loss": result.loss,
            "loss_share": None if mixing.loss_share is None else float(mixing.loss_share[i]),
            "heating_weight": None if mixing.heating is None else float(mixing.heating[i]),
            "mixed_from": row,
            "validation": dict(validation[client.name]),
            "seconds": result.seconds,
        }
    for name, measured in validation.items():
        clients.setdefault(name, {"samples": 0, "validation": dict(measured)})
    alike = None if mixing.similarity is None else mixing.similarity.tolist()
    return {"server_round": server_round + 1, "similarity": alike, "clients": clients}


def _keep(federation: Federation, config: Config, folder: Path, server_round: int, which: str) -> None:
    """Keep every client's whole adapter, when the run asks for it."""
    if not config.run.keep_rounds:
        return
    for client in federation.clients:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in client.model.adapter().items()}
        path = folder / "rounds" / str(server_round + 1) / client.name / f"{which}.safetensors"
        write_atomic(path, save(tensors, metadata={"format": "pt"}))


def write_checkpoint(federation: Federation, store: CheckpointStore, improved: dict[str, AdapterState]) -> None:
    """Write everything that the next round depends on."""
    tensors = {}
    for client in federation.clients:
        flat = dict(client.model.adapter())
        flat |= {_OPTIMIZER + name: tensor for name, tensor in client.model.optimizer_state().items()}
        if client.personal is not None:
            flat |= {_PERSONAL + name: tensor for name, tensor in client.personal.adapter().items()}
            state = client.personal.optimizer_state()
            flat |= {_PERSONAL + _OPTIMIZER + name: tensor for name, tensor in state.items()}
        tensors[client.name] = {name: tensor.cpu() for name, tensor in flat.items()}
    standing = {
        "next_round": federation.next_round,
        "records": federation.records,
        "best": {c.name: [c.best.server_round, c.best.score] for c in federation.clients if c.best is not None},
    }
    store.write(federation.next_round - 1, standing, tensors, improved)


def restore_checkpoint(federation: Federation, checkpoint: Checkpoint) -> None:
    """Put every party back to where a checkpoint was written.

    Raises:
        CheckpointError: The checkpoint is of another federation.
    """
    try:
        best = dict(checkpoint.state["best"])
        for client in federation.clients:
            flat = checkpoint.tensors(f"client-{client.name}")
            own = {name: tensor for name, tensor in flat.items() if not name.startswith((_OPTIMIZER, _PERSONAL))}
            client.model.set_adapter(own)
            client.model.restore_optimizer(_without(flat, _OPTIMIZER))
            if client.personal is not None:
                personal = _without(flat, _PERSONAL)
                adapter = {name: tensor for name, tensor in personal.items() if not name.startswith(_OPTIMIZER)}
                client.personal.set_adapter(adapter)
                client.personal.restore_optimizer(_without(personal, _OPTIMIZER))
            if client.name in best:
                client.best = Best(int(best[client.name][0]), best[client.name][1])
        federation.records = list(checkpoint.state["records"])
        federation.next_round = int(checkpoint.state["next_round"])
    except (KeyError, FileNotFoundError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} is of another federation: it lacks {error}",
            cure="Resume with the configuration that wrote it.",
        ) from error


def _without(flat: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}
