"""A run folder as a report reads it: every file that is there, checked, and ``None`` for one that is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from pplr.config import Config
from pplr.errors import RunError
from pplr.runtimes.run import Run, open_run

__all__ = [
    "AttackRecord",
    "AuditRecord",
    "ClientRecord",
    "IntervalRecord",
    "MetricsRecord",
    "ProvenanceRecord",
    "RoundRecord",
    "RunFiles",
    "SettingRecord",
    "read_run",
]

_Number = int | float | None
_Figures = dict[str, _Number]
_Model = TypeVar("_Model")


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Cut(_Told):
    input_layers: int
    output_layers: int
    total_layers: int | None = None
    by_client: dict[str, _Figures] = {}


class _Tested(_Told):
    overall: _Figures = {}
    clients: dict[str, _Figures] = {}


class _Cost(_Told):
    client: _Figures = {}
    server: _Figures = {}
    whole: _Figures = {}
    wire: _Figures = {}


class _Spent(_Told):
    epsilon: _Figures
    delta: float
    noise_multiplier: _Number = None
    sampling_rate: _Number = None
    clip_norm: _Number = None
    unit: str = ""
    adjacency: str = ""
    middle: str = ""
    note: str = ""


class _Guarded(_Told):
    summary: str
    note: str = ""


class MetricsRecord(_Tested):
    """The content of ``metrics.json``."""

    method: str
    backbone: str
    cut: _Cut | None = None
    spread: dict[str, _Figures] = {}
    floors: dict[str, _Figures] = {}
    before: _Tested | None = None
    cost: _Cost = _Cost()
    seconds: _Figures = {}
    samples_per_second: _Number = None
    privacy: _Spent | None = None
    states: _Guarded | None = None


class ClientRecord(_Told):
    """One client in a line of ``rounds.jsonl``; one that did not train in the round has no ``mixed_from``."""

    samples: _Number = None
    loss: _Number = None
    loss_share: _Number = None
    heating_weight: _Number = None
    mixed_from: dict[str, float] = {}
    validation: _Figures = {}
    seconds: _Number = None
    bytes_up: _Number = None
    bytes_down: _Number = None
    epsilon: _Number = None


class RoundRecord(_Told):
    """A line of ``rounds.jsonl``."""

    server_round: int
    similarity: list[list[float | None]] | None = None
    clients: dict[str, ClientRecord]

    @property
    def mixed(self) -> list[str]:
        """Clients that took part in the mixing, in the order of ``similarity``."""
        return [name for name, own in self.clients.items() if own.mixed_from]

    @model_validator(mode="after")
    def _square(self) -> RoundRecord:
        rows, names = self.similarity, self.mixed
        if rows is not None and [len(row) for row in rows] != [len(names)] * len(names):
            raise ValueError(f"similarity is not one row and column for each of the {len(names)} clients that trained")
        return self


class _Data(_Told):
    source: str = ""
    users: _Number = None
    items: _Number = None
    interactions: _Number = None
    users_without_test_case: _Number = None
    cleaning: list[str] = []


class ProvenanceRecord(_Told):
    """The content of ``provenance.json``."""

    seed: int
    versions: dict[str, str] = {}
    machine: dict[str, str | int] = {}
    data: _Data = _Data()
    clients: dict[str, str] = {}
    hashes: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return content | {"hashes": {name: own for name, own in content.items() if name.endswith("_sha256")}}


class IntervalRecord(_Told):
    """A mean over users with its 95 % interval."""

    mean: float
    low: float
    high: float
    users: int | None = None


class _Worth(_Told):
    mean: _Number
    low: _Number = None
    high: _Number = None
    users: int


class AttackRecord(_Told):
    """What one attack found, each metric by its name."""

    audit: str
    knowledge: str
    seconds: _Number = None
    found: dict[str, IntervalRecord | None]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return content | {"found": {name: own for name, own in content.items() if name not in cls.model_fields}}


class SettingRecord(_Told):
    """One cut, guard, noise and wire format in ``audit.json``."""

    cut: _Cut
    noise: float
    passes: int = 1
    wire: str | None = None
    guard: str | None = None
    worth: _Worth
    audits: list[AttackRecord]


class AuditRecord(_Told):
    """The content of ``audit.json``."""

    cut: _Cut | None
    guard: str | None = None
    metric: str
    users: int
    wire: str = ""
    seed: int = 0
    baseline: dict[str, IntervalRecord | None]
    settings: list[SettingRecord] = Field(min_length=1)
    verdict: str
    raw: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _keep(cls, content: Any) -> Any:
        return content | {"raw": content} if isinstance(content, dict) else content


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds.

    Args:
        run: The run, for its evaluations.
        metrics: ``None`` while the run is not finished.
        rounds: One for each finished server round.
        provenance: ``None`` where it is not written.
        audit: ``None`` where nobody has attacked the run.
        booked: Server rounds in each client's ledger, from 1; empty without ledgers.
    """

    run: Run
    metrics: MetricsRecord | None
    rounds: Sequence[RoundRecord]
    provenance: ProvenanceRecord | None
    audit: AuditRecord | None
    booked: dict[str, list[int]]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.run.folder

    @property
    def config(self) -> Config:
        """What it was made with."""
        return self.run.config

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def clients(self) -> list[str]:
        """Names of all clients that any file tells of, in their order."""
        told = list(self.provenance.clients if self.provenance else ())
        told += self.metrics.clients if self.metrics else ()
        return list(dict.fromkeys([*told, *(name for one in self.rounds for name in one.clients)]))


def read_run(folder: str | Path) -> RunFiles:
    """Read a run folder, of a run that is finished or not.

    Args:
        folder: The run's.

    Raises:
        RunError: It is no run folder, or a file in it is damaged or of another version; the file is named.
    """
    run = open_run(folder)
    again = "Go on with --resume, or run `pplr evaluate`, to write it again."
    return RunFiles(
        run=run,
        metrics=_read(run.folder / "metrics.json", MetricsRecord, again),
        rounds=_read_lines(run.folder / "rounds.jsonl"),
        provenance=_read(run.folder / "provenance.json", ProvenanceRecord, "Go on with --resume to write it again."),
        audit=_read(run.folder / "audit.json", AuditRecord, f"Run `pplr audit {run.folder}` again."),
        booked={path.stem: _booked(path) for path in sorted((run.folder / "privacy").glob("*.json"))},
    )


def _read(path: Path, kind: type[_Model], cure: str) -> _Model | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__})", cure=cure) from error
    return _checked(path, text, kind, cure)


def _read_lines(path: Path) -> list[RoundRecord]:
    cure = "Go on with --resume to write it again."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__})", cure=cure) from error
    return [_checked(path, line, RoundRecord, cure, f"line {place}, ") for place, line in enumerate(lines, start=1)]


def _checked(path: Path, text: str, kind: type[_Model], cure: str, where: str = "") -> _Model:
    try:
        return TypeAdapter(kind).validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise RunError(f"{path} is damaged or of another version: {where}{place}: {first['msg']}", cure=cure) from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {where}{error}", cure=cure) from error


class _Booking(_Told):
    server_round: int


class _Ledger(_Told):
    booked: list[_Booking]


def _booked(path: Path) -> list[int]:
    found = _read(path, _Ledger, "Put it back: without it nobody knows what was spent.")
    return sorted({own.server_round for own in found.booked}) if found else []
