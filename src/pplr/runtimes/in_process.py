"""The reference runtime: all clients in this process, and the server's side too unless a stage server hosts it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pplr.backbones.adapters import AdapterState, check_adapter, load_adapter, save_adapter
from pplr.backbones.base import Backbone
from pplr.config import Config
from pplr.errors import CheckpointError
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.rounds import Federation, restore_checkpoint, run_rounds
from pplr.privacy.ledger import Ledger, coverage, refuse_over_budget
from pplr.progress import Progress, Silent
from pplr.recommend.evaluation import Evaluation, Ranker, evaluate
from pplr.recommend.floors import fit_floor
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.memory import peak_rss_bytes
from pplr.runtimes.run import SECRETS, Run
from pplr.runtimes.run_folder import RoundWriter, claimed, training_cost, write_start
from pplr.runtimes.state_counts import announced, guarded_run
from pplr.runtimes.told_flops import summed_flops, trained_rounds
from pplr.runtimes.trackers import Tracking
from pplr.runtimes.training_flops import training_flops
from pplr.storage import write_json

__all__ = ["evaluate_run", "train"]


def train(
    config: Config,
    run_dir: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    backbone: Backbone | None = None,
    stage_server: StageServerAt | None = None,
) -> Run:
    """Train a federation, keep each client's best adapter, and measure them on the test cases.

    Args:
        config: The run.
        run_dir: The run folder; made when absent.
        resume: Go on from the newest whole checkpoint. The adapters end with the same bytes as those of a run that
            was never stopped.
        progress: Told of every step.
        backbone: A loaded backbone, to share one between runs.
        stage_server: Hosts the middle blocks; this process hosts them when absent.

    Returns:
        The finished run.

    Raises:
        ServerLostError: The stage server does not answer any more; the run can be resumed.
        RunError: The folder holds a run already, or one of another configuration, or is in use.
        PplrError: Whatever else keeps the run from being carried out.
    """
    folder, progress = Path(run_dir), progress or Silent()
    started: float | None = time.perf_counter()
    with (
        Tracking(config, progress.note) as tracking,
        claimed(folder, config, resume=resume),
        contextlib.ExitStack() as closing,
    ):
        secrets = folder / SECRETS
        store = CheckpointStore(folder / "checkpoints", keep=config.run.checkpoints, warn=progress.note)
        assembly = Assembly(config, progress, backbone, stage_server, secrets=secrets)
        closing.enter_context(contextlib.closing(assembly))
        if config.privacy.dp.is_on:
            progress.note(refuse_over_budget(config, assembly.trainers))
            progress.note(coverage(personal=assembly.method.personal))
        if config.privacy.states.is_on:
            progress.note(announced(assembly))
        checkpoint = store.newest() if resume else None
        if checkpoint is not None:
            assembly.check_secrets()
        federation = assembly.federation(secrets)
        write_start(folder, assembly)
        if checkpoint is not None:
            restore_checkpoint(federation, checkpoint)
            _check_ledgers(federation)
            started = None  # the time of the processes before this one is not known
            progress.note(f"going on after server round {federation.next_round} of {config.federation.rounds}")
        tracking.begin(folder)
        writer = RoundWriter(federation, folder, progress, tracking)
        writer.write()
        run_rounds(federation, config, store, writer, folder)
        _export(federation, assembly, store, folder)
        assembly.dismiss_all()  # the adapters are in the run folder
        run = Run(folder, config, assembly, stage_server)
        tracking.finish(evaluate_run(run, progress, started=started))
        closing.pop_all()  # the run goes on with the parts
        return run


def _check_ledgers(federation: Federation) -> None:
    """Refuse to go on where a client's ledger lacks a round that it has trained."""
    for client in federation.clients:
        if isinstance(client.books, Ledger):
            told = [(record["server_round"], record["clients"].get(client.name, {})) for record in federation.records]
            client.books.check(server_round for server_round, own in told if "epsilon" in own)


def _export(federation: Federation, assembly: Assembly, store: CheckpointStore, folder: Path) -> None:
    """Write each client's best adapter in PEFT's form; of a client that was never drawn, the one it has."""
    checkpoint = store.newest()
    if checkpoint is None:
        raise CheckpointError("the run has no checkpoint", cure="Start again with another --run-dir.")
    config = assembly.config
    for name, trainer in assembly.serving(federation).items():
        state = trainer.serving.adapter() if trainer.best is None else checkpoint.tensors(f"best-{trainer.name}")
        save_adapter(state, folder / "clients" / name, config.adapter, config.backbone.model, assembly.backbone.task)


def evaluate_run(run: Run, progress: Progress, *, started: float | None = None) -> dict[str, Any]:
    """Measure the saved adapters, the floors and, if asked, the initial adapter; write ``metrics.json``.

    Args:
        run: A run whose adapters are saved.
        progress: Told of every step.
        started: When the run began, for its total time; measured in the run itself only.

    Returns:
        The content of ``metrics.json``.
    """
    assembly, config, settings = run.assembly(progress), run.config, run.config.evaluation
    data = assembly.data
    began = time.perf_counter()
    adapters = {name: load_adapter(run.folder / "clients" / name) for name in data.partition.names}
    for name, adapter in adapters.items():
        check_adapter(adapter, assembly.model.shapes, whose=f"the saved adapter of client {name}")

    def reader(client: str, adapter: AdapterState) -> Ranker:
        admitted.callback(assembly.dismiss, client, "test")
        return assembly.ranker(assembly.admit(client, adapter, "test"))

    def measure(label: str, rankers: Mapping[str, Ranker] | Ranker) -> Evaluation:
        with progress.task(label, sum(map(len, data.test.values())), "users") as advance:
            return evaluate(rankers, data.test, settings.cutoffs, settings.batch_size, advance)

    found = {}
    with contextlib.ExitStack() as admitted:
        if settings.before:
            found["before"] = measure("testing the initial adapter", reader("initial", assembly.initial))
        own = {name: reader(name, adapter) for name, adapter in adapters.items()}
        found["test"] = measure("testing each client's adapter", own)
    items = len(data.dataset.catalog)
    for floor in settings.floors:
        found[floor] = measure(f"testing {floor}", fit_floor(floor, data.holdout, items, config.run.seed))
    seconds = time.perf_counter() - began
    write_json(run.folder / "evaluation.json", {name: part.to_dict() for name, part in found.items()})
    metrics = _metrics(run, assembly, found)
    total = None if started is None else time.perf_counter() - started
    before = run.metrics
    if total is None and before is not None:
        total = before["seconds"]["total"]
    metrics["seconds"] = {"total": total, "train": training_cost(run.rounds)["seconds"], "evaluate": seconds}
    write_json(run.folder / "metrics.json", metrics)
    return metrics


def _metrics(run: Run, assembly: Assembly, found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Put the content of ``metrics.json`` together; what was not measured is ``None``."""
    config, test = run.config, found["test"]
    trained = training_cost(run.rounds)
    stored = {name: assembly.model_of(name).stored_bytes() for name in assembly.data.partition.names}
    client_bytes = max(client for client, _ in stored.values())
    hosted = [server for _, server in stored.values() if server is not None]
    in_all = {client + server for client, server in stored.values() if server is not None}
    flops = _flops(run, assembly)
    plan = assembly.plan
    cut: dict[str, Any] | None = None
    if not plan.is_whole:
        cut = {
            "input_layers": plan.input_layers,
            "output_layers": plan.output_layers,
            "total_layers": plan.total_layers,
        }
        if config.cut is not None and config.cut.by_client:
            cut["by_client"] = {name: own.model_dump() for name, own in config.cut.by_client.items()}
    content: dict[str, Any] = {
        "method": config.federation.method,
        "backbone": config.backbone.name,
        "cut": cut,
        "overall": test.overall(),
        "clients": test.by_client(),
        "spread": test.spread(),
        "floors": {name: found[name].overall() for name in config.evaluation.floors},
    }
    if "before" in found:
        content["before"] = {"overall": found["before"].overall(), "clients": found["before"].by_client()}
    # Where one process holds both sides, neither's memory can be told apart.
    peak = peak_rss_bytes() if assembly.is_remote else None
    content["cost"] = {
        "client": {"stored_bytes": client_bytes, "peak_rss_bytes": peak, "train_flops": flops["client"]},
        "server": {
            "stored_bytes": max(hosted) if hosted else None,
            "peak_rss_bytes": None,
            "train_flops": flops["server"],
        },
        "whole": {
            "stored_bytes": in_all.pop() if len(in_all) == 1 else None,
            "peak_rss_bytes": None,
            "train_flops": flops["whole"],
        },
        "wire": {"bytes_up": trained["bytes_up"], "bytes_down": trained["bytes_down"]},
    }
    content["samples_per_second"] = trained["samples_per_second"]
    if config.privacy.dp.is_on:
        content["privacy"] = _privacy(run, assembly)
    if config.privacy.states.is_on:
        content["states"] = guarded_run(assembly, run.rounds)
    return content


def _flops(run: Run, assembly: Assembly) -> dict[str, int | None]:
    """Add up what the training of all clients took on each side, worked out; ``None`` where that cannot be."""
    records = run.rounds
    if not records:
        return summed_flops([])
    told = [training_flops(assembly, name, trained_rounds(records, name)) for name in assembly.trainers]
    return summed_flops([None if own is None else asdict(own) for own in told])


def _privacy(run: Run, assembly: Assembly) -> dict[str, Any]:
    """Say what the run spent, of what, and what that does not cover."""
    private = run.config.privacy.dp
    spent = dict.fromkeys(assembly.trainers, 0.0)  # a client that was never drawn spends nothing
    for record in run.rounds:
        spent |= {name: own["epsilon"] for name, own in record["clients"].items() if "epsilon" in own}
    return {
        "unit": "user",
        "adjacency": "add or remove one user",
        "epsilon": spent,
        "delta": private.delta,
        "noise_multiplier": private.noise_multiplier,
        "sampling_rate": private.sampling_rate,
        "clip_norm": private.clip_norm,
        "middle": "frozen" if private.freeze_middle else "trained",
        "note": coverage(personal=assembly.method.personal),
    }
