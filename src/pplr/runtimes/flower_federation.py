"""A federation through Flower between machines: the server's link, and a run that an operator carries out over it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pplr.config import Config
from pplr.errors import ConfigError, FederationError
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.methods import make_method
from pplr.federation.server import FederationServer
from pplr.privacy.refusals import refuse_lies
from pplr.privacy.states import told_of_states
from pplr.progress import Progress, Silent
from pplr.recommend.metrics import spread
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.flower_enrolled import client_names, client_of_key, link_of
from pplr.runtimes.flower_settings import load_flower
from pplr.runtimes.middles import Middles, StageMiddles
from pplr.runtimes.orders import OrderDesk, greeting, read_start
from pplr.runtimes.run_folder import RoundWriter, claimed, training_cost
from pplr.runtimes.told_flops import summed_flops
from pplr.runtimes.trackers import Tracking
from pplr.storage import write_atomic, write_json

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = ["train"]

_JOIN_S = 120.0
"""Seconds that clients have to join at least: one that is just being started, or that lost its link, needs a minute."""


def train(
    config: Config,
    run_dir: str | Path,
    *,
    federation: Path,
    state: Path,
    stage_server: StageServerAt | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train with the clients of a federation, each on its own machine with its own data.

    Args:
        config: The run; ``federation.clients`` follows from who is enrolled.
        run_dir: The run folder; made when absent.
        federation: The federation's folder.
        state: The server's state folder.
        stage_server: Hosts the middle blocks of all clients, by an operator's kit; each client hosts its own when
            absent. Middle adapters stay there: they are read and mixed on the server's side, and no client is sent
            them.
        resume: Go on from the newest whole checkpoint.
        progress: Told of every step.

    Returns:
        The content of ``metrics.json``; test figures are means that the clients tell.

    Raises:
        ConfigError: Flower is not installed.
        FederationError: Clients do not join, do not belong together, or too few answer.
        IdentityError: The kit is none of an operator.
        TransportError: The stage server does not answer.
        RunError: The folder holds a run already, or one of another configuration, or is in use.
    """
    load_flower()
    from pplr.runtimes import flower, flower_link

    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    link, names = link_of(federation, state), client_names(federation)
    folder, heard = Path(run_dir), progress or Silent()
    config = config.model_copy(
        update={
            "federation": config.federation.model_copy(update={"clients": len(names)}),
            "runtime": config.runtime.model_copy(update={"name": "flower"}),
        }
    )

    refuse_lies(config, hosted_elsewhere=stage_server is not None)

    def identify(grid: Grid) -> Mapping[int, str]:
        keys = client_of_key(federation)
        return {node.node_id: keys[node.public_key] for node in grid.get_nodes() if node.public_key in keys}

    if stage_server is not None and config.cut is None:
        raise ConfigError("a stage server for a model that is not cut", cure="Set cut, or leave out --kit.")
    with (
        Tracking(config, heard.note) as tracking,
        claimed(folder, config, resume=resume),
        contextlib.ExitStack() as closing,
    ):
        middles = None
        if stage_server is not None:
            middles = closing.enter_context(contextlib.closing(StageMiddles(stage_server.kit, stage_server.address)))
        if not (folder / "config.yaml").exists():
            write_atomic(folder / "config.yaml", config.to_yaml().encode())
        standing = _Standing()
        tracking.begin(folder)
        writer = RoundWriter(standing, folder, heard, tracking)

        def open_desk(reports: Mapping[str, bytes]) -> OrderDesk:
            desk = _open_desk(config, reports, folder, resume, heard, middles)
            standing.records = desk.server.records
            writer.write()
            return desk

        deadline = config.runtime.deadline_s
        hello = greeting(config, hosted=middles is not None)
        join = max(deadline, _JOIN_S)
        strategy = flower.OrderStrategy(names, hello, open_desk, deadline, writer, identify=identify, join_s=join)
        with flower_link.link_errors(link.address):
            with contextlib.closing(flower_link.Operator(link)) as operator:
                run_id = operator.start_run()
            with flower_link.server_grid(link, run_id) as (grid, _):
                strategy.start(grid)
                told = strategy.test(grid)
        for name in names:
            if name not in told:
                heard.note(f"client {name} did not test its adapter: its figures are missing")
        metrics = _metrics(config, {name: told[name] for name in names if name in told}, standing.records)
        write_json(folder / "metrics.json", metrics)
        tracking.finish(metrics)
        return metrics


class _Standing:
    """Where the records are, once there is a server that keeps them."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []


def _open_desk(
    config: Config,
    reports: Mapping[str, bytes],
    folder: Path,
    resume: bool,
    progress: Progress,
    middles: Middles | None = None,
) -> OrderDesk:
    """Take what most clients start from, refuse those that start from something else, and go on where the run was.

    Raises:
        FederationError: A client has another model, catalog or start than most.
    """
    starts = {name: read_start(report, whose=f"client {name}") for name, report in reports.items()}
    (most, count), *_ = Counter(start.hashes for start in starts.values()).most_common()
    if others := [name for name, start in starts.items() if start.hashes != most]:
        raise FederationError(
            f"client {others[0]} has another model, catalog or start than {count} of the {len(starts)} clients",
            cure="Give every client the same model and the same file of items, with data.catalog: all.",
        )
    initial = next(iter(starts.values())).initial
    store = CheckpointStore(folder / "checkpoints", keep=config.run.checkpoints, warn=progress.note)
    method = make_method(config.federation)
    server = FederationServer(config, method, list(reports), initial, store, progress.note)
    if resume and server.restore():
        progress.note(f"going on after server round {server.next_round} of {config.federation.rounds}")
    _, model, catalog = most
    hosted = {name: start.hosted for name, start in starts.items()}
    return OrderDesk(server, model, catalog, progress.note, middles, hosted)


def _metrics(
    config: Config, told: Mapping[str, Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Put the content of ``metrics.json`` together from what clients tell; what they do not is ``None``."""
    if not told:
        raise FederationError("no client tested its adapter", cure="Start the clients, then go on with --resume.")
    clients = {name: dict(own["tested"]) for name, own in told.items()}
    names = [key for key in next(iter(clients.values())) if key != "users"]
    users = {name: int(own["users"]) for name, own in clients.items()}
    total = sum(users.values())
    overall = {
        key: sum(users[name] * (own[key] or 0.0) for name, own in clients.items()) / total if total else None
        for key in names
    }
    stored = [own["stored_bytes"] for own in told.values()]
    hosted = [own["server"] for own in stored if own["server"] is not None]
    trained = training_cost(records)
    in_all = {own["client"] + own["server"] for own in stored if own["server"] is not None}
    flops = summed_flops([own.get("train_flops") for own in told.values()])
    guarded = {"states": told_of_states(config.privacy.states, {"state": 1})} if config.privacy.states.is_on else {}
    return {
        "method": config.federation.method,
        "backbone": config.backbone.name,
        "cut": None if config.cut is None else config.cut.model_dump(exclude={"by_client"}),
        "overall": overall,
        "clients": clients,
        "spread": {key: spread({name: own[key] for name, own in clients.items()}) for key in names},
        "floors": {},
        "cost": {
            "client": _cost(max(own["client"] for own in stored), flops["client"]),
            "server": _cost(max(hosted) if hosted else None, flops["server"]),
            "whole": _cost(in_all.pop() if len(in_all) == 1 else None, flops["whole"]),
            "wire": {key: trained[key] for key in ("bytes_up", "bytes_down")},
        },
        "seconds": {"total": None, "train": trained["seconds"], "evaluate": None},
        "samples_per_second": trained["samples_per_second"],
        **guarded,
    }


def _cost(stored: int | None, flops: int | None) -> dict[str, int | None]:
    """Lay out what one side stores and computed; how much memory its process took is not told here."""
    return {"stored_bytes": stored, "peak_rss_bytes": None, "train_flops": flops}
