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
from pplr.federation.checkpoints import Checkpoint, CheckpointStore
from pplr.federation.client import FederatedClient
from pplr.federation.decisions import Best, Trained, decide, mix_into, out_of_patience, participants_of, round_record
from pplr.federation.methods import Method
from pplr.progress import Progress
from pplr.recommend.local_result import LocalResult
from pplr.storage import write_atomic

__all__ = ["Federation", "restore_checkpoint", "run_rounds", "write_checkpoint"]


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
    method, clients = federation.method, {client.name: client for client in federation.clients}
    while federation.next_round < config.federation.rounds and not _out_of_patience(federation, config):
        server_round = federation.next_round
        _begin_round(federation, server_round, store)
        participants = participants_of(list(clients), server_round, config)
        crossed = {name: clients[name].traffic for name in participants}

        # 1. Every participant trains its own adapter on its own samples.
        results: dict[str, LocalResult] = {}
        for name in participants:
            epochs = config.training.local_epochs * (2 if method.personal else 1)
            label = f"server round {server_round + 1}, client {name}"
            with progress.task(label, epochs * len(clients[name].encoded), "samples") as advance:
                results[name] = clients[name].train(server_round, config, method, advance)
        trained = {name: _told(clients[name], results[name], federation.initial) for name in participants}
        _keep(federation, config, folder, server_round, "local")

        # 2. Similarity and heating decide who learns from whom, by what clients exchange.
        adapters = [own.adapter for own in trained.values()]
        mixing = decide(method, server_round, federation.initial, list(trained.values()), adapters)

        # 3. All adapters are mixed from one snapshot.
        averaging = config.federation.averaging
        mix_into(lambda name, own: clients[name].set_adapter(own), list(clients), method, mixing, trained, averaging)
        _keep(federation, config, folder, server_round, "mixed")

        # 4. Every client whose adapter changed measures it, and remembers its best round.
        changed = list(clients) if method.shared and not method.personal else participants
        validation, improved = {}, {}
        with progress.task(f"server round {server_round + 1}, validation", len(changed), "clients") as advance:
            for name in changed:
                validation[name], better = clients[name].validate(server_round, config.evaluation.validation_metric)
                if better:
                    improved[name] = clients[name].serving.adapter()
                advance(1)

        # 5. The round is recorded and checkpointed.
        record = round_record(server_round, trained, mixing, validation)
        for name in participants:
            traffic = clients[name].traffic.since(crossed[name])
            record["clients"][name] |= {"bytes_up": traffic.bytes_up, "bytes_down": traffic.bytes_down}
            if (books := clients[name].books) is not None:
                record["clients"][name]["epsilon"] = books.epsilon()
        federation.records.append(record)
        federation.next_round += 1
        write_checkpoint(federation, store, improved)
        progress.server_round(record)


def _told(client: FederatedClient, result: LocalResult, initial: AdapterState) -> Trained:
    """Check what a client trained, and take what it exchanges.

    Raises:
        AdapterError: It is not finite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    adapter = client.model.adapter()
    check_adapter(adapter, shapes, whose=f"client {client.name}'s adapter")
    if client.personal is not None:
        check_adapter(client.personal.adapter(), shapes, whose=f"client {client.name}'s personal adapter")
    private = client.model.backbone.private
    exchanged = {name: tensor for name, tensor in adapter.items() if name not in private}
    return Trained(result, len(client.encoded) if client.books is None else 1, exchanged)


def _out_of_patience(federation: Federation, config: Config) -> bool:
    best = {client.name: client.best for client in federation.clients if client.best is not None}
    return out_of_patience(best, federation.next_round, config.federation.patience)


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
    tensors = {client.name: client.state() for client in federation.clients}
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
            client.restore(checkpoint.tensors(f"client-{client.name}"))
            if client.name in best:
                client.best = Best(int(best[client.name][0]), best[client.name][1])
        federation.records = list(checkpoint.state["records"])
        federation.next_round = int(checkpoint.state["next_round"])
    except (KeyError, FileNotFoundError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} is of another federation: it lacks {error}",
            cure="Resume with the configuration that wrote it.",
        ) from error
