"""A run whose clients are actors of Flower's Ray engine, on this machine or a Ray cluster with a shared folder."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pplr.config import Config
from pplr.errors import FederationError
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.server import FederationServer
from pplr.progress import Progress, Silent
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.flower_settings import load_flower
from pplr.runtimes.in_process import evaluate_run
from pplr.runtimes.orders import OrderDesk, greeting
from pplr.runtimes.parcels import Parcel
from pplr.runtimes.participant import Participant
from pplr.runtimes.run import SECRETS, Run
from pplr.runtimes.run_folder import RoundWriter, claimed, write_start
from pplr.runtimes.trackers import Tracking

if TYPE_CHECKING:
    from flwr.app import Context

__all__ = ["SimulatedClients", "train"]

_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Read when Ray is imported: with 0 it keeps to loopback, on every system; else it listens on the machine's address."""


def train(config: Config, run_dir: str | Path, *, resume: bool = False, progress: Progress | None = None) -> Run:
    """Train a federation through Flower's simulation engine; what comes of it is what ``in_process`` gives.

    Args:
        config: The run.
        run_dir: The run folder, which all actors can reach; made when absent.
        resume: Go on from the newest whole checkpoint.
        progress: Told of every step.

    Returns:
        The finished run.

    Raises:
        ConfigError: Flower is not installed.
        FederationError: Too few clients answered.
        RunError: The folder holds a run already, or one of another configuration, or is in use.
    """
    load_flower()
    folder, progress = Path(run_dir).resolve(), progress or Silent()
    started: float | None = time.perf_counter()
    with (
        Tracking(config, progress.note) as tracking,
        claimed(folder, config, resume=resume),
        contextlib.ExitStack() as closing,
    ):
        assembly = closing.enter_context(contextlib.closing(Assembly(config, progress, secrets=folder / SECRETS)))
        store = CheckpointStore(folder / "checkpoints", keep=config.run.checkpoints, warn=progress.note)
        names = assembly.data.partition.names
        initial = assembly.exchanged(assembly.initial)
        server = FederationServer(config, assembly.method, names, initial, store, progress.note)
        write_start(folder, assembly)
        if resume and server.restore():
            assembly.check_secrets()
            started = None  # the time of the processes before this one is not known
            progress.note(f"going on after server round {server.next_round} of {config.federation.rounds}")
        tracking.begin(folder)
        writer = RoundWriter(server, folder, progress, tracking)
        writer.write()
        base, catalog = assembly.backbone.fingerprint(), assembly.data.dataset.catalog.sha256
        _carry_out(config, folder, OrderDesk(server, base, catalog, progress.note), writer)
        run = Run(folder, config, assembly)
        tracking.finish(evaluate_run(run, progress, started=started))
        closing.pop_all()  # the run goes on with the parts
        return run


def _carry_out(config: Config, folder: Path, desk: OrderDesk, progress: Progress) -> None:
    """Let Flower carry out the rounds, and every client write its best adapter."""
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault(_CLUSTERS, "0")
    flower = load_flower()
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    failed: list[BaseException] = []
    gone = threading.Event()
    server_app = ServerApp()

    def open_desk(reports: Mapping[str, bytes]) -> OrderDesk:
        for name, report in reports.items():
            desk.greet(name, report)
        return desk

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            strategy = flower.OrderStrategy(
                desk.server.names, greeting(config), open_desk, config.runtime.deadline_s, progress, gone
            )
            strategy.start(grid)
            told = strategy.test(grid)
            if missing := [name for name in desk.server.names if name not in told]:
                raise FederationError(f"client {missing[0]} did not test its adapter", cure="Go on with --resume.")
        except BaseException as error:  # told by the caller's thread, without Flower's words around it
            failed.append(error)

    clients = SimulatedClients(config.to_yaml(), folder, desk.server.names)
    resources: dict[str, Any] = {"num_cpus": config.runtime.client_cpus, "num_gpus": config.runtime.client_gpus}
    here: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:  # it names a cluster to join
        here |= {"num_cpus": os.cpu_count()}
    with _own_log(folder / "flower.log"), _asking_nobody():
        try:
            run_simulation(
                server_app,
                flower.make_client_app(clients),
                len(desk.server.names),
                backend_config={"client_resources": resources, "init_args": here},
            )
        except RuntimeError as error:
            raise FederationError(
                f"Flower's engine failed: {error.__cause__ or error}", cure=f"See {folder / 'flower.log'}."
            ) from error
        finally:
            gone.set()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _asking_nobody() -> Iterator[None]:
    """Start Ray without its API server, which serves nothing here.

    With its dashboard and its usage reports off, that process still asks the metadata service of three clouds, by the
    link-local address 169.254.169.254, where it runs. No setting of Ray's keeps it from being started, so this answers
    in its place as Ray itself does where it failed to start.
    """
    from ray._private import services

    start = services.start_api_server
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        services.start_api_server = start


@contextlib.contextmanager
def _own_log(path: Path) -> Iterator[None]:
    """Write what Flower logs to a file of the run, not over the progress on the screen."""
    logger = logging.getLogger("flwr")
    before, handlers = logger.propagate, logger.handlers[:]
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, before
        handler.close()


class SimulatedClients:
    """Answers orders in an actor of the engine, which keeps the model and the data of its clients from one to the next.

    Args:
        config: The run's configuration, as YAML.
        folder: The run folder.
        names: The clients, in the order of the engine's nodes.
    """

    _assemblies: dict[Path, Assembly] = {}  # noqa: RUF012  (of this process)
    _participants: dict[tuple[Path, str], Participant] = {}  # noqa: RUF012

    def __init__(self, config: str, folder: Path, names: tuple[str, ...]) -> None:
        self._config, self._folder, self._names = config, folder, names

    def __call__(self, context: Context, order: bytes) -> bytes:
        """Answer an order as the client that the node stands for."""
        name = self._names[int(context.node_config["partition-id"])]
        return self._participant(name).answer(Parcel.unpack(order, whose="the server")).pack()

    def _participant(self, name: str) -> Participant:
        key = (self._folder, name)
        if key not in self._participants:
            state = self._folder / "checkpoints" / "clients" / name
            self._participants[key] = Participant(self._assembly(), name, state, self._folder / "clients" / name)
        return self._participants[key]

    def _assembly(self) -> Assembly:
        if self._folder not in self._assemblies:
            import yaml

            config = Config.model_validate(yaml.safe_load(self._config))
            threads = config.runtime.threads or max(1, int(config.runtime.client_cpus))
            runtime = config.runtime.model_copy(update={"threads": threads})
            config = config.model_copy(update={"runtime": runtime})
            self._assemblies[self._folder] = Assembly(config, Silent(), secrets=self._folder / SECRETS)
        return self._assemblies[self._folder]
