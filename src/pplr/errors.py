"""Every error that pplr raises on purpose, in one tree.

::

    PplrError
    ├── ConfigError            a configuration that cannot be run
    ├── DataError              data that cannot be used as it is
    │   ├── SourceError        a source that is missing, unreachable or altered
    │   ├── PartitionError     users that cannot be shared out among the clients as asked
    │   └── UnknownItemError   a title, item or user that the data does not hold
    ├── BackboneError          a model that cannot be loaded or adapted
    │   └── UnsupportedModelError   a model family that pplr has not verified
    ├── CutError               a cut that does not fit the model
    ├── TransportError         what happens between the two sides of the cut
    │   ├── LimitError         what is over the limits that a stage server grants
    │   ├── ServerLostError    a stage server that does not answer any more, or knows the session no more
    │   ├── UnknownSessionError  a session that is not, or no longer, the caller's
    │   └── WireError          a message that is malformed or over a limit
    ├── AdapterError           an adapter that does not fit, or is not finite
    ├── FederationError        a server round that cannot be carried out
    ├── IdentityError          a key, certificate or name that does not prove who is there
    └── RunError               a run folder that cannot be used
        ├── CheckpointError    a checkpoint that is truncated, altered or newer than this version
        └── StorageError       the disk is full or refuses to be written

Each message says what was seen, what was expected, and what to do. The command line prints it in one
line and ends with exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial

__all__ = [
    "AdapterError",
    "BackboneError",
    "CheckpointError",
    "ConfigError",
    "CutError",
    "DataError",
    "FederationError",
    "IdentityError",
    "LimitError",
    "PartitionError",
    "PplrError",
    "RunError",
    "ServerLostError",
    "SourceError",
    "StorageError",
    "TransportError",
    "UnknownItemError",
    "UnknownSessionError",
    "UnsupportedModelError",
    "WireError",
    "nearest",
]


class PplrError(Exception):
    """An error that a person can act on.

    Args:
        message: What was seen and what was expected.
        cure: What to do about it, as an imperative sentence.

    Example:
        >>> print(CutError("the cut takes 31 of 30 blocks", cure="Lower cut.input_layers."))
        the cut takes 31 of 30 blocks. Lower cut.input_layers.
    """

    def __init__(self, message: str, *, cure: str) -> None:
        self.message = message.rstrip(".")
        self.cure = cure
        super().__init__(f"{self.message}. {cure}")

    def __reduce__(self) -> tuple[partial[PplrError], tuple[()]]:
        return partial(type(self), self.message, cure=self.cure), ()  # so that it can go to another process


class ConfigError(PplrError):
    """A configuration that cannot be run."""


class DataError(PplrError):
    """Data that cannot be used as it is."""


class SourceError(DataError):
    """A source that is missing, unreachable or altered."""


class PartitionError(DataError):
    """Users that cannot be shared out among the clients as asked."""


class UnknownItemError(DataError):
    """A title, item or user that the data does not hold."""


class BackboneError(PplrError):
    """A model that cannot be loaded or adapted."""


class UnsupportedModelError(BackboneError):
    """A model family that pplr has not verified."""


class CutError(PplrError):
    """A cut that does not fit the model."""


class TransportError(PplrError):
    """What went wrong between the two sides of the cut."""


class LimitError(TransportError):
    """What was asked of a stage server is over what it grants."""


class UnknownSessionError(TransportError):
    """A session that is not, or no longer, the caller's."""


class ServerLostError(TransportError):
    """A stage server that does not answer any more, or that was started anew; the run can be resumed."""


class WireError(TransportError):
    """A message between the two sides that is malformed or over a limit."""


class AdapterError(PplrError):
    """An adapter that does not fit its place, or is not finite."""


class FederationError(PplrError):
    """A server round that cannot be carried out."""


class IdentityError(PplrError):
    """A key, certificate or name that does not prove who is there."""


class RunError(PplrError):
    """A run folder that cannot be used."""


class CheckpointError(RunError):
    """A checkpoint that is truncated, altered or newer than this version."""


class StorageError(RunError):
    """A disk that is full or refuses to be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the known word nearest to a mistyped one, as a hint that ends an error message.

    Returns:
        A phrase such as ``Did you mean 'rounds'?``, or a list of what is known when nothing is near.

    Example:
        >>> nearest("ronuds", ["rounds", "clients"])
        "Did you mean 'rounds'?"
        >>> nearest("x", ["rounds", "clients"])
        "Known: 'clients', 'rounds'."
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Known: " + ", ".join(repr(word) for word in known[:20]) + ("." if len(known) <= 20 else ", ...")
