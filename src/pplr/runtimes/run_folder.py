"""A run folder while a run writes it: claimed by one process, and begun with what the run is of."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pplr.config import Config
from pplr.errors import RunError
from pplr.progress import Progress
from pplr.runtimes.claiming import LOCK, claim
from pplr.runtimes.run import OWN, open_run
from pplr.runtimes.trackers import Tracking
from pplr.storage import storage_errors, write_atomic, write_json

if TYPE_CHECKING:
    from pplr.runtimes.assembly import Assembly

__all__ = [
    "HasRecords",
    "RoundWriter",
    "claimed",
    "device_name",
    "training_cost",
    "write_own",
    "write_start",
]


class HasRecords(Protocol):
    """Whoever keeps the records of the finished server rounds."""

    records: list[dict[str, Any]]


class RoundWriter:
    """Hears every server round, and writes ``rounds.jsonl`` before passing it on, to the run's trackers too."""

    def __init__(self, standing: HasRecords, folder: Path, progress: Progress, tracking: Tracking) -> None:
        self._standing, self._path, self._progress = standing, folder / "rounds.jsonl", progress
        self._tracking = tracking
        self.note, self.task = progress.note, progress.task

    def write(self) -> None:
        """Write all records so far."""
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in self._standing.records)
        write_atomic(self._path, lines.encode())
        self._tracking.rounds(self._standing.records)

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Hear the record of a finished server round."""
        self.write()
        self._progress.server_round(record)


@contextlib.contextmanager
def claimed(folder: Path, config: Config, *, resume: bool) -> Iterator[None]:
    """Claim a run folder for this process, and refuse one that holds something else."""
    path = folder / "config.yaml"
    _refuse_foreign(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    with lock:
        if not claim(lock):
            raise RunError(f"another process is writing {folder}", cure="Wait for it, or choose another --run-dir.")
        if path.exists():
            before = open_run(folder).config
            if before != config:
                raise RunError(
                    f"{folder} holds a run of another configuration ({_first_difference(before, config)})",
                    cure="Choose another --run-dir.",
                )
            if not resume:
                raise RunError(
                    f"{folder} holds this run already", cure="Go on with --resume, or choose another --run-dir."
                )
        _refuse_foreign(folder)
        with storage_errors(folder):
            for remains in list(folder.rglob(".*.tmp")):  # of a process that was killed
                if remains.is_dir():
                    shutil.rmtree(remains)
                else:
                    remains.unlink(missing_ok=True)
        yield


def _refuse_foreign(folder: Path) -> None:
    """Touch nothing in a folder that holds something else than a run."""
    if not folder.is_dir() or (folder / "config.yaml").exists():
        return
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if name != LOCK and not fnmatch(name, ".config.yaml.*.tmp")]:
        raise RunError(
            f"{folder} is not empty and is not a run folder (it holds {others[0]})", cure="Choose another --run-dir."
        )


def _first_difference(before: Config, after: Config) -> str:
    def walk(a: Any, b: Any, place: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a:
                if found := walk(a[key], b.get(key), f"{place}.{key}".strip(".")):
                    return found
            return None
        return f"{place} is {a} there and {b} here" if a != b else None

    return walk(before.model_dump(mode="json"), after.model_dump(mode="json"), "") or "the same fields"


def training_cost(records: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Add up what the rounds recorded of the clients' training; ``None`` where nothing is recorded."""
    rows = [client for record in records for client in record["clients"].values() if "seconds" in client]
    seconds = sum(row["seconds"] for row in rows)
    samples = [row["samples"] for row in rows if row["samples"] is not None]  # private training tells none
    return {
        "seconds": seconds if rows else None,
        "samples_per_second": sum(samples) / seconds if seconds and len(samples) == len(rows) else None,
        "bytes_up": sum(row["bytes_up"] for row in rows) if rows else None,
        "bytes_down": sum(row["bytes_down"] for row in rows) if rows else None,
    }


def write_own(folder: Path, config: Config, client: str, *, hosted: bool) -> None:
    """Begin the run folder of one client of a federation, on its own machine.

    Args:
        folder: The run's; made when absent.
        config: The run's configuration, with what the client sets itself.
        client: Its name.
        hosted: Whether a stage server hosts the middle blocks.
    """
    write_json(folder / OWN, {"client": client, "hosted": hosted})
    write_atomic(folder / "config.yaml", config.to_yaml().encode())


def device_name(device: torch.device) -> str:
    """Name what a backbone computes on: ``cpu``, or an accelerator as its driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write_start(folder: Path, assembly: Assembly) -> None:
    """Write the configuration and where everything came from; a run that goes on must find the same there."""
    import numpy
    import peft
    import transformers

    import pplr

    data = assembly.data
    content: dict[str, Any] = {
        "seed": assembly.config.run.seed,
        "versions": {
            "pplr": pplr.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "numpy": numpy.__version__,
        },
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": device_name(assembly.backbone.device),
        },
        "data": {
            "source": data.dataset.name,
            "users": len(data.dataset.user_ids),
            "items": len(data.dataset.catalog),
            "interactions": len(data.dataset.interactions),
            "users_without_test_case": data.left_out,
            "cleaning": list(data.dataset.notes),
        },
        "catalog_sha256": data.dataset.catalog.sha256,
        "holdout_sha256": data.holdout.sha256,
        "partition_sha256": data.partition.sha256,
        "model_sha256": assembly.backbone.fingerprint(),
        "clients": dict(zip(data.partition.names, data.partition.labels, strict=True)),
    }
    path = folder / "provenance.json"
    before: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = json.loads(path.read_text(encoding="utf-8"))
    for name, digest in content.items():
        if name.endswith("_sha256") and before.get(name, digest) != digest:
            what = name.removesuffix("_sha256")
            raise RunError(
                f"{folder} was begun with another {what}: its SHA-256 is no longer the one in provenance.json",
                cure="Put the data and the model back as they were, or choose another --run-dir.",
            )
    if not (folder / "config.yaml").exists():
        write_atomic(folder / "config.yaml", assembly.config.to_yaml().encode())
    write_json(path, content)
