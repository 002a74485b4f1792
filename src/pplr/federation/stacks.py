"""The adapters of many clients, read one tensor of all clients at a time: held in memory, or lying on disk."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.errors import StorageError
from pplr.storage import storage_errors, write_json

__all__ = ["HeldAdapters", "SomeAdapters", "Stack", "StoredAdapters", "stack_of"]

_MANIFEST = "stack.json"


class Stack(ABC):
    """C adapters with the same names and shapes.

    Attributes:
        shapes: Shape of each tensor, in natural order.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def __len__(self) -> int:
        """Count clients."""

    @abstractmethod
    def rows(self, name: str) -> Tensor:
        """Read one tensor of all clients: ``(C, *shape)``, float32."""


class HeldAdapters(Stack):
    """Adapters in memory.

    Args:
        states: One for each client.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        self._states = states
        self.shapes = {name: tuple(tensor.shape) for name, tensor in states[0].items()}

    def __len__(self) -> int:
        return len(self._states)

    def rows(self, name: str) -> Tensor:
        """Stack: ``(C, *shape)``."""
        return torch.stack([state[name] for state in self._states])


class SomeAdapters(Stack):
    """Some clients of a stack, in a given order.

    Args:
        stack: Of more clients.
        places: Which of them.
    """

    def __init__(self, stack: Stack, places: Sequence[int]) -> None:
        self._stack, self._places = stack, list(places)
        self.shapes = stack.shapes

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, name: str) -> Tensor:
        """Pick: ``(C, *shape)``."""
        rows = self._stack.rows(name)
        return rows if self._places == list(range(len(rows))) else rows[self._places]


class StoredAdapters(Stack):
    """Adapters in a folder, a file for each tensor with a row for each client, so that one tensor is held at a time.

    A place to work in: what must outlive the process belongs into a checkpoint. Files are read and written, not mapped
    into memory: a mapped page counts as resident, and a full disk would end the process instead of raising.

    Args:
        folder: One that :meth:`create` has made.

    Raises:
        StorageError: The folder is none, or not whole.
    """

    def __init__(self, folder: Path) -> None:
        try:
            told = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            self.shapes = {name: tuple(shape) for name, shape in told["shapes"].items()}
            self._clients = int(told["clients"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{folder} holds no adapters: {error}", cure="Make it with create.") from error
        self._places = {name: folder / f"{number}.f32" for number, name in enumerate(self.shapes)}
        for name, path in self._places.items():
            seen, expected = path.stat().st_size if path.exists() else 0, len(self) * self._row_bytes(name)
            if seen != expected:
                raise StorageError(f"{path} holds {seen} bytes of {name}, expected {expected}", cure="Make it anew.")

    @classmethod
    def create(cls, folder: Path, shapes: Mapping[str, tuple[int, ...]], clients: int) -> StoredAdapters:
        """Make a folder of adapters that are zero.

        Raises:
            StorageError: The disk refuses, or the folder is there already.
        """
        with storage_errors(folder):
            folder.mkdir(parents=True)
            for number, shape in enumerate(shapes.values()):
                with (folder / f"{number}.f32").open("xb") as file:
                    file.truncate(4 * clients * int(np.prod(shape)))
        write_json(folder / _MANIFEST, {"clients": clients, "shapes": {k: list(v) for k, v in shapes.items()}})
        return cls(folder)

    def __len__(self) -> int:
        return self._clients

    def _row_bytes(self, name: str) -> int:
        return 4 * int(np.prod(self.shapes[name]))

    def rows(self, name: str) -> Tensor:
        """Read: ``(C, *shape)``."""
        numbers = np.fromfile(self._places[name], dtype="<f4")
        return torch.from_numpy(numbers).view(len(self), *self.shapes[name])

    def write_rows(self, name: str, rows: Tensor) -> None:
        """Write one tensor of all clients: ``(C, *shape)``.

        Raises:
            StorageError: The disk refuses.
        """
        self._write(name, 0, rows, (len(self), *self.shapes[name]))

    def put(self, client: int, state: Mapping[str, Tensor]) -> None:
        """Write one client's adapter.

        Raises:
            StorageError: The disk refuses.
        """
        if not 0 <= client < len(self):
            raise IndexError(client)
        for name, shape in self.shapes.items():
            self._write(name, client, state[name], shape)

    def _write(self, name: str, client: int, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}, expected {shape}")
        content = tensor.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False)
        with storage_errors(self._places[name]), self._places[name].open("r+b") as file:
            file.seek(client * self._row_bytes(name))
            content.tofile(file)

    def get(self, client: int) -> AdapterState:
        """Read one client's adapter."""
        if not 0 <= client < len(self):
            raise IndexError(client)
        state = {}
        for name, shape in self.shapes.items():
            start, count = client * self._row_bytes(name), int(np.prod(shape))
            numbers = np.fromfile(self._places[name], dtype="<f4", count=count, offset=start)
            state[name] = torch.from_numpy(numbers).view(shape)
        return state


def stack_of(adapters: Stack | Sequence[Mapping[str, Tensor]]) -> Stack:
    """Take a stack as it is, and adapters in memory as one."""
    return adapters if isinstance(adapters, Stack) else HeldAdapters(adapters)
