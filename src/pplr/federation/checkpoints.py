"""Checkpoints that are whole or absent, and a run that goes on from them as if it had never stopped.

A checkpoint is a folder ``checkpoints/<server_round>``: the state of the rounds as JSON, one safetensors file for
each client (adapter, optimizer), one for each client's best adapter, and a manifest with the SHA-256 of each file.
It is written beside its place and renamed into it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.errors import CheckpointError
from pplr.storage import sha256_file, storage_errors, write_atomic, write_json

__all__ = ["FORMAT", "Checkpoint", "CheckpointStore"]

FORMAT = 1
"""Version of the layout; a newer one is refused."""

_BEFORE = "The one before it is used."


class _DamagedError(CheckpointError):
    """A checkpoint that is not whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Args:
        folder: Where it lies.
        state: The state of the rounds.
    """

    folder: Path
    state: Mapping[str, Any]

    def path(self, name: str) -> Path:
        """Say where one of its safetensors files lies."""
        return self.folder / f"{name}.safetensors"

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one of its safetensors files."""
        return dict(load_file(self.path(name)))


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: How many of the newest to keep.
        warn: Told of every checkpoint that is refused.
    """

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._keep = keep
        self._warn = warn
        self._whole: Path | None = None  # the newest that was read or written here

    def write(
        self,
        server_round: int,
        state: Mapping[str, Any],
        clients: Mapping[str, Mapping[str, Tensor]],
        improved: Mapping[str, AdapterState],
    ) -> Checkpoint:
        """Write the checkpoint of a finished server round, then drop the oldest.

        Args:
            server_round: Counted from 0.
            state: What else is needed to go on, as JSON.
            clients: Adapter and optimizer of each client, as flat tensors.
            improved: Best adapters that are new; a client that is not named keeps its best of the newest checkpoint.

        Both are asked for one client at a time, so they need not lie in memory.

        Returns:
            What was written.

        Raises:
            StorageError: The disk is full or refuses; the checkpoints that were there before are untouched.
        """
        final = self.folder / f"{server_round + 1:06d}"
        work = self.folder / f".{final.name}.tmp"
        try:
            with storage_errors(final):
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            self._fill(work, state, clients, improved)
            with storage_errors(final):
                shutil.rmtree(final, ignore_errors=True)
                os.replace(work, final)  # noqa: PTH105
                descriptor = os.open(self.folder, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        self._whole = final
        refused = [folder for folder in self._folders() if folder.name > final.name]
        for old in [*refused, *self._folders()[len(refused) + self._keep :]]:
            shutil.rmtree(old, ignore_errors=True)
        return Checkpoint(final, state)

    def _fill(
        self,
        work: Path,
        state: Mapping[str, Any],
        clients: Mapping[str, Mapping[str, Tensor]],
        improved: Mapping[str, AdapterState],
    ) -> None:
        """Write the files of a checkpoint, the manifest last."""
        for name, tensors in clients.items():
            write_atomic(work / f"client-{name}.safetensors", save({k: v.contiguous() for k, v in tensors.items()}))
            best = work / f"best-{name}.safetensors"
            if name in improved:
                write_atomic(best, save({k: v.contiguous() for k, v in improved[name].items()}))
            elif self._whole is not None and (self._whole / best.name).exists():
                with storage_errors(best):
                    content = (self._whole / best.name).read_bytes()
                write_atomic(best, content)
        write_json(work / "state.json", dict(state))
        hashes = {path.name: sha256_file(path) for path in sorted(work.iterdir())}
        write_json(work / "manifest.json", {"format": FORMAT, "sha256": hashes})

    def newest(self, before: int | None = None) -> Checkpoint | None:
        """Return the newest checkpoint that is whole; each damaged one on the way is told aloud.

        Args:
            before: Pass over those of this server round, counted from 0, and later ones.

        Raises:
            CheckpointError: There are checkpoints, and none of them is whole, or the newest is of a newer format.
        """
        folders = [folder for folder in self._folders() if before is None or int(folder.name) <= before]
        for folder in folders:
            try:
                found = self._read(folder)
            except _DamagedError as error:
                self._warn(str(error))
            else:
                self._whole = folder
                return found
        if folders:
            raise CheckpointError(
                f"none of the {len(folders)} checkpoints in {self.folder} is whole",
                cure="Start again with another --run-dir.",
            )
        return None

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)

    def _read(self, folder: Path) -> Checkpoint:
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            version, hashes = int(manifest["format"]), dict(manifest["sha256"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise _DamagedError(f"checkpoint {folder} has no readable manifest", cure=_BEFORE) from None
        if version > FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} has format {version}, newer than {FORMAT}", cure="Update pplr to use it."
            )
        for name, digest in hashes.items():
            path = folder / name
            if not path.is_file() or sha256_file(path) != digest:
                raise _DamagedError(f"checkpoint {folder} is damaged: {name} does not match its SHA-256", cure=_BEFORE)
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _DamagedError(f"checkpoint {folder} is damaged: {error}", cure=_BEFORE) from error
        return Checkpoint(folder, state)
