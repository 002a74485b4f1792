"""Middle adapters and optimizers on the stage server's disk: whole or absent, by the rules of a run's checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from torch import Tensor

from pplr.errors import CheckpointError
from pplr.federation.checkpoints import CheckpointStore
from pplr.storage import storage_errors

__all__ = ["Owner", "Saved", "StateStore"]

_KEPT = 2
_TENSORS = "tenancy"


@dataclass(frozen=True, order=True)
class Owner:
    """Whose tenancy.

    Args:
        client: The name that the client's certificate gives.
        tenant: A name that the client chose below its own.
    """

    client: str
    tenant: str

    def __str__(self) -> str:
        """Write it as it is shown."""
        return f"{self.client}/{self.tenant}"


@dataclass(frozen=True)
class Saved:
    """A tenancy as it was saved.

    Args:
        settings: The base, the cut and the settings that it belongs to.
        tensors: Adapter and optimizer, flat.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class StateStore:
    """The tenancies that a stage server keeps on disk, the newest two of each.

    Args:
        folder: Only this user can enter it.
        warn: Told of every damaged one that is passed over.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self._warn = folder, warn
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)

    def save(self, owner: Owner, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a tenancy; the one saved before stays as a reserve.

        Raises:
            StorageError: The disk is full or refuses; what was saved before is untouched.
        """
        store = self._store(owner)
        with storage_errors(self._place(owner)):
            numbers = [int(path.name) for path in self._place(owner).glob("[0-9]*") if path.name.isdecimal()]
        store.write(
            max(numbers, default=0), dict(settings), {_TENSORS: {n: t.detach().cpu() for n, t in tensors.items()}}, {}
        )

    def load(self, owner: Owner) -> Saved | None:
        """Read a tenancy as it was saved last; of a damaged one, the one before.

        Raises:
            CheckpointError: There are only damaged ones, or one of a newer format.
        """
        found = self._store(owner).newest()
        if found is None:
            return None
        try:
            return Saved(dict(found.state), found.tensors(f"client-{_TENSORS}"))
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{found.folder} cannot be read", cure="Delete it; the one before is used."
            ) from error

    def owners(self) -> list[Owner]:
        """List whose tenancies are saved."""
        return sorted(
            Owner(client.name.removeprefix("c-"), unquote(tenant.name.removeprefix("t-")))
            for client in self.folder.glob("c-*")
            for tenant in client.glob("t-*")
        )

    def _place(self, owner: Owner) -> Path:
        return self.folder / f"c-{owner.client}" / f"t-{quote(owner.tenant, safe='')}"

    def _store(self, owner: Owner) -> CheckpointStore:
        return CheckpointStore(self._place(owner), keep=_KEPT, warn=self._warn)
