"""The server's orders to its clients and what it makes of their reports, as bytes, whatever carries them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pplr.backbones.adapters import AdapterState, adapter_sha256, natural_order
from pplr.config import Config
from pplr.errors import FederationError, PplrError, ServerLostError, WireError
from pplr.federation.decisions import Trained
from pplr.federation.server import FederationServer
from pplr.lazy import LazyMapping
from pplr.recommend.local_result import LocalResult
from pplr.recommend.metrics import ranking_metrics
from pplr.runtimes.middles import Middles
from pplr.runtimes.parcels import HELLO, TEST, TRAIN, VALIDATE, Parcel
from pplr.runtimes.told_flops import SIDES, trained_rounds
from pplr.storage import sha256_bytes

__all__ = ["OrderDesk", "Reports", "Start", "greeting", "read_hello", "read_start", "run_token"]

_SAME = "Use the same configuration, model and catalog on both sides."
Reports = Iterable[tuple[str, bytes]]
"""Clients' names, and what each reports."""
_SHARED = ("initial_sha256", "model_sha256", "catalog_sha256")
_MOST = 2**53
_MOST_FLOPS = 10**27
"""Largest number that is believed: beyond it, floats skip whole numbers."""
_RESULT = {"samples": int, "steps": int, "tokens": int, "targets": int, "loss": float, "seconds": float}


def read_hello(report: bytes, *, whose: str) -> str:
    """Read the name that a client gives; the rest is checked by :meth:`OrderDesk.greet`."""
    return str(_unpack(report, HELLO, whose).told.get("client"))


@dataclass(frozen=True)
class Start:
    """What a client starts from.

    Args:
        hashes: Of its initial adapter, its base model and its catalog.
        initial: What it exchanges, before any training.
        hosted: Names of those tensors of it that are on a stage server.
    """

    hashes: tuple[str, str, str]
    initial: AdapterState
    hosted: frozenset[str]


def read_start(report: bytes, *, whose: str) -> Start:
    """Read what a client starts from, for a server that has neither model nor data to know it by.

    Raises:
        FederationError: The adapter is not the one of its hash, or not finite.
        WireError: The report cannot be read.
    """
    parcel = _unpack(report, HELLO, whose)
    initial = {name: parcel.tensors[name] for name in natural_order(parcel.tensors)}
    hashes = [str(parcel.told.get(key)) for key in _SHARED]
    if adapter_sha256(initial) != hashes[0] or not all(bool(own.isfinite().all()) for own in initial.values()):
        raise FederationError(f"{whose} tells another start than it sends", cure=_SAME)
    hosted = parcel.told.get("hosted", [])
    if not isinstance(hosted, list) or not all(isinstance(name, str) and name in initial for name in hosted):
        raise WireError(f"{whose} does not tell which tensors are on a stage server", cure=_SAME)
    return Start((hashes[0], hashes[1], hashes[2]), initial, frozenset(hosted))


def _unpack(report: bytes, kind: str, whose: str) -> Parcel:
    parcel = Parcel.unpack(report, whose=whose)
    if parcel.kind != kind:
        raise WireError(f"{whose} answered {parcel.kind!r} to an order {kind!r}", cure=_SAME)
    return parcel


def _result_of(told: Any, whose: str) -> LocalResult:
    """Read how a training went: these fields, each of its type, and no other."""
    if not isinstance(told, dict) or set(told) != set(_RESULT):
        raise WireError(f"{whose} does not tell how its training went", cure=_SAME)
    for name, kind in _RESULT.items():
        if type(told[name]) not in (kind, int) or not _is_number(told[name]):
            raise WireError(f"{whose} tells {name} {str(told[name])[:50]}, which is no number", cure=_SAME)
    return LocalResult(**{name: kind(told[name]) for name, kind in _RESULT.items()})


def run_token(config_yaml: str) -> str:
    """Name a run by its configuration, so that a client that was started again knows which run an order is of."""
    return sha256_bytes(config_yaml.encode())[:16]


def greeting(config: Config, *, hosted: bool = False) -> bytes:
    """Order a client to say who it is and what it has, for a run of this configuration.

    Args:
        config: The run's configuration.
        hosted: Whether the federation's stage server hosts the middle blocks of all clients.
    """
    return Parcel(HELLO, {"config": config.to_yaml(), "hosted": hosted}).pack()


class OrderDesk:
    """Orders of one run, in the order of its rounds: train, validate, and at the end test.

    A report counts once, for the attempt that it answers: a late one, of a round or an attempt that is over, is
    passed over, and so is whatever cannot be read.

    Args:
        server: What is decided by.
        model_sha256: The frozen base that every client must hold.
        catalog_sha256: The catalog that every client must have.
        note: Told of every report that is passed over, and why.
        middles: The stage server's side of it, where there is one.
        hosted: Names of the tensors of each client that are on the stage server, and so in no order and no report.
    """

    def __init__(
        self,
        server: FederationServer,
        model_sha256: str,
        catalog_sha256: str,
        note: Callable[[str], None],
        middles: Middles | None = None,
        hosted: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        self.server = server
        self._middles, self._hosted = middles, hosted or {}
        if middles is None and any(self._hosted.values()):
            raise FederationError("clients have middle blocks on a stage server, and this run has none", cure=_SAME)
        self._shared = dict(zip(_SHARED, (adapter_sha256(server.initial), model_sha256, catalog_sha256), strict=True))
        self._note = note
        self._run = run_token(server.config.to_yaml())
        evaluation = server.config.evaluation
        self._rankings = frozenset(ranking_metrics([1], evaluation.cutoffs))
        self._metrics = frozenset({"loss"}) if evaluation.validation_metric == "loss" else self._rankings
        self._attempt = ""
        self._failed = 0
        self._traffic: dict[str, dict[str, int]] = {"bytes_up": {}, "bytes_down": {}}

    # -- who is there -------------------------------------------------------------------------------------------

    def greet(self, name: str, report: bytes) -> None:
        """Check that a client starts from the same as the server.

        Raises:
            FederationError: It has another base, catalog or start.
        """
        told = _unpack(report, HELLO, f"client {name}").told
        for key, digest in self._shared.items():
            if told.get(key) != digest:
                what = key.removesuffix("_sha256")
                raise FederationError(f"client {name} has another {what} than the server", cure=_SAME)

    # -- a round ------------------------------------------------------------------------------------------------

    def training_orders(self) -> Mapping[str, bytes]:
        """Order the participants of the next round to train, each from its own adapter."""
        self._attempt = uuid.uuid4().hex
        return LazyMapping(self.server.begin(), lambda name: self._order(TRAIN, name))

    def take_training(self, reports: Reports) -> bool:
        """Take what the participants trained, one after the other as they come, and mix it.

        Args:
            reports: Of every participant that answers in time.

        Returns:
            Whether the round stands; if not, its training is to be ordered again.

        Raises:
            FederationError: Too few answered, for the last time.
        """
        self._traffic = {"bytes_up": {}, "bytes_down": {}}
        for name, parcel in self._read(TRAIN, reports):
            try:
                told = parcel.told
                result = _result_of(told.get("result"), f"client {name}")
                counts = {key: _count(told.get(key), key, name) for key in ("samples", *self._traffic)}
                adapter = self._joined(name, parcel.tensors)
            except ServerLostError:  # no fault of the client's: the run ends, and is resumed
                raise
            except PplrError as error:
                self._note(str(error))
                continue
            self.server.take(name, Trained(result, counts["samples"], adapter))
            for key, own in self._traffic.items():
                own[name] = counts[key]
        try:
            self.server.mix()
        except FederationError as error:
            self._failed += 1
            if self._failed >= self.server.config.runtime.attempts:
                raise
            self._note(f"{error.args[0]}: it is ordered again")
            return False
        self._failed = 0
        return True

    def validation_orders(self) -> Mapping[str, bytes]:
        """Order every client whose adapter changed to measure it."""
        return LazyMapping(self.server.changed(), lambda name: self._order(VALIDATE, name))

    def take_validation(self, reports: Reports) -> dict[str, Any]:
        """Record and checkpoint the round; a client that did not measure counts as not improved.

        Returns:
            The record of the round.
        """
        measured: dict[str, dict[str, float | None]] = {}
        improved = []
        for name, parcel in self._read(VALIDATE, reports):
            values = parcel.told.get("measured")
            try:
                if not isinstance(values, dict) or not _are_measured(values, self._metrics):
                    raise WireError(f"client {name} tells {str(values)[:200]} of its validation", cure=_SAME)
                counts = {key: _count(parcel.told.get(key), key, name) for key in self._traffic}
            except WireError as error:
                self._note(str(error))
                continue
            for key, own in self._traffic.items():
                if name in own:  # it trained as well
                    own[name] += counts[key]
            measured[name] = {str(key): None if value is None else float(value) for key, value in values.items()}
            if parcel.told.get("improved") is True:
                improved.append(name)
        return self.server.finish(measured, improved, self._traffic)

    # -- the end ------------------------------------------------------------------------------------------------

    def test_orders(self) -> Mapping[str, bytes]:
        """Order every client to write its best adapter and to measure it on its test cases."""

        def order(name: str) -> bytes:
            trained = trained_rounds(self.server.records, name)  # what its training took is the client's to say
            return Parcel(TEST, {"run": self._run, "trained": trained}).pack()

        return LazyMapping(self.server.names, order)

    def take_tests(self, reports: Reports) -> dict[str, Mapping[str, Any]]:
        """Read what each client tells of its test: means and counts alone; what cannot be believed is passed over."""
        told = {}
        for name, report in reports:
            try:
                own = _unpack(report, TEST, f"client {name}").told
                tested, stored = own.get("tested"), own.get("stored_bytes")
                if not isinstance(tested, dict) or not _are_measured(tested, self._rankings | {"users"}):
                    raise WireError(f"client {name} tells {str(tested)[:200]} of its test", cure=_SAME)
                _count(tested["users"], "users", name)
                if not isinstance(stored, dict) or set(stored) != {"client", "server"}:
                    raise WireError(f"client {name} does not tell what it stores", cure=_SAME)
                for key, size in stored.items():
                    if size is not None or key == "client":
                        _count(size, f"stored bytes of the {key}", name)
                flops = own.get("train_flops")
                if flops is not None and (not isinstance(flops, dict) or set(flops) != set(SIDES)):
                    raise WireError(f"client {name} tells {str(flops)[:200]} of what its training took", cure=_SAME)
                for key, count in (flops or {}).items():
                    _count(count, f"operations of the {key}", name, _MOST_FLOPS)
                told[name] = own
            except WireError as error:
                self._note(str(error))
        return told

    # -- parts --------------------------------------------------------------------------------------------------

    def _order(self, kind: str, name: str) -> bytes:
        """Order a client to go on from its adapter: what is on a stage server is offered there, the rest is sent."""
        told: dict[str, Any] = {
            "run": self._run,
            "server_round": self.server.next_round,
            "attempt": self._attempt,
        }
        adapter, hosted = self.server.adapter_of(name), self._hosted.get(name, frozenset())
        if self._middles is not None and hosted:
            told["offer"] = f"{self._attempt}-{kind}"
            self._middles.offer(name, told["offer"], {key: adapter[key] for key in adapter if key in hosted})
        return Parcel(kind, told, {key: own for key, own in adapter.items() if key not in hosted}).pack()

    def _joined(self, name: str, sent: Mapping[str, Tensor]) -> AdapterState:
        """Put what a client sent and what the stage server has of it together.

        Raises:
            ServerLostError: The stage server does not answer.
            TransportError: It has nothing of this client.
            WireError: The client sends what is on the stage server.
        """
        hosted = self._hosted.get(name, frozenset())
        if self._middles is None or not hosted:
            return dict(sent)
        if twice := sorted(hosted & sent.keys()):
            raise WireError(f"client {name} sends {twice[0]}, which is on the stage server", cure=_SAME)
        middle = self._middles.read(name)
        both = {**sent, **{key: own for key, own in middle.items() if key in hosted}}
        return {key: both[key] for key in natural_order(both)}

    def _read(self, kind: str, reports: Reports) -> Iterator[tuple[str, Parcel]]:
        """Read the reports that answer the order of this round and attempt, each when it comes."""
        expected = (self.server.next_round, self._attempt)
        for name, report in reports:
            try:
                parcel = _unpack(report, kind, f"client {name}")
            except PplrError as error:
                self._note(str(error))
                continue
            answers = (parcel.told.get("server_round"), parcel.told.get("attempt"))
            if answers != expected:
                self._note(f"client {name} answers an order that is over, of server round {answers[0]!r}: passed over")
            else:
                yield name, parcel


def _count(value: Any, key: str, name: str, most: int = _MOST) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise WireError(f"client {name} tells {key} {str(value)[:50]}, which counts nothing", cure=_SAME)
    return value


def _are_measured(values: Mapping[str, Any], metrics: frozenset[str]) -> bool:
    """Whether these are the metrics that are to be measured, each a number or nothing."""
    return values.keys() == metrics and all(value is None or _is_number(value) for value in values.values())


def _is_number(value: Any) -> bool:
    """Whether this is a finite number that arithmetic can be done with; JSON can write one that overflows."""
    return type(value) in (int, float) and -_MOST <= value <= _MOST
