"""The shells that Flower calls, with a grid of this test's: who joins, what is passed over, when waiting ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from pplr.errors import ConfigError, FederationError, WireError
from pplr.federation.methods import make_method
from pplr.federation.server import FederationServer
from pplr.runtimes import flower, flower_settings
from pplr.runtimes.orders import OrderDesk, greeting
from pplr.runtimes.parcels import HELLO, VALIDATE, Parcel
from pplr.testing import refuses

Handler = Callable[[int, Message], Message | None]
SHARED = {"initial_sha256": "", "model_sha256": "m", "catalog_sha256": "c"}


class Heard:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.records: list[dict] = []
        self.note = self.notes.append
        self.server_round = self.records.append

    def task(self, label, total, unit):
        import contextlib

        return contextlib.nullcontext(lambda _: None)


class FakeGrid:
    """Nodes that answer at once, each by its handler."""

    def __init__(self, handlers: dict[int, Handler]) -> None:
        self.handlers, self.waiting, self.numbers = handlers, {}, itertools.count(1)

    def get_node_ids(self) -> list[int]:
        return list(self.handlers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self.numbers))
            pushed.append(message.metadata.message_id)
            node = message.metadata.dst_node_id
            if (reply := self.handlers[node](node, message)) is not None:
                reply.metadata.__dict__["_src_node_id"] = node
                self.waiting[message.metadata.message_id] = reply
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.waiting.pop(one) for one in list(message_ids) if one in self.waiting]


@pytest.fixture
def strategy(tmp_path, small_config, monkeypatch):
    """Make a strategy of two clients whose adapters are of no tensors, as nothing is mixed here."""

    def make(deadline_s: float = 0.5, gone: threading.Event | None = None, identify=None) -> flower.OrderStrategy:
        from pplr.federation.checkpoints import CheckpointStore

        heard = Heard()
        config = small_config("federation.clients=2")
        store = CheckpointStore(tmp_path / "checkpoints", keep=1, warn=heard.note)
        server = FederationServer(config, make_method(config.federation), ["a", "b"], {}, store, heard.note)
        desk = OrderDesk(server, "m", "c", heard.note)
        monkeypatch.setattr(TaskIdentity, "_run_id", 1)  # as Flower's process does
        monkeypatch.setattr(TaskIdentity, "_node_id", 1)
        monkeypatch.setattr(TaskIdentity, "_task_id", 1)
        SHARED["initial_sha256"] = desk._shared["initial_sha256"]

        def open_desk(reports):
            for name, report in reports.items():
                desk.greet(name, report)
            return desk

        made = flower.OrderStrategy(["a", "b"], greeting(config), open_desk, deadline_s, heard, gone, identify)
        made.heard = heard  # type: ignore[attr-defined]
        return made

    return make


def says(name: str, **other) -> Handler:
    app = flower.make_client_app(lambda context, order: Parcel(HELLO, {"client": name} | SHARED | other).pack())
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    return lambda node, message: app(message, context)


def fails(node: int, message: Message) -> Message:
    return Message(error=Error(code=3, reason="out of\nmemory"), reply_to=message)


def empty(node: int, message: Message) -> Message:
    return Message(content=RecordDict(), reply_to=message)


def silent(node: int, message: Message) -> None:
    return None


@pytest.mark.parametrize(
    ("handlers", "kind", "words"),
    [
        ({7: says("a"), 8: says("a")}, FederationError, "two nodes say that they are client a"),
        ({7: says("a"), 8: says("z")}, FederationError, "says it is 'z'; the run knows a, b"),
        ({7: says("a"), 8: silent}, FederationError, "client b did not join"),
        ({7: says("a")}, FederationError, "1 of 2 clients joined"),
        ({7: says("a"), 8: fails}, FederationError, "node 8 failed: out of memory"),
        ({7: says("a"), 8: empty}, WireError, "node 8 sent a message without a parcel"),
        ({7: says("a"), 8: says("b", model_sha256="x")}, FederationError, "client b has another model than the server"),
        ({7: says("a"), 8: says("b", catalog_sha256=None)}, FederationError, "client b has another catalog"),
    ],
)
def test_a_run_begins_when_every_client_is_there_once_and_starts_alike(strategy, handlers, kind, words) -> None:
    with refuses(kind, words):
        strategy().start(FakeGrid(handlers))


def test_replies_are_taken_by_the_name_under_which_a_node_joined(strategy) -> None:
    found = strategy()
    grid = FakeGrid({7: says("b"), 8: says("a"), 9: says("nobody")})
    joined = FakeGrid({node: grid.handlers[node] for node in (7, 8)})
    found._join(joined)
    report = Parcel(VALIDATE, {"server_round": 0}).pack()

    def answers(node: int, message: Message) -> Message:
        return Message(content=flower._wrap(report), reply_to=message)

    orders = list(found._messages({"a": b"", "b": b""}, "train", 1))
    assert [message.metadata.dst_node_id for message in orders] == [8, 7]
    stray = Message(content=flower._wrap(b""), message_type="train", dst_node_id=9, group_id="1")
    here = FakeGrid({7: fails, 8: answers, 9: answers})
    reports = dict(found._reports(found._exchange(here, "training", [*orders, stray])))
    assert reports == {"a": report}
    assert "client b failed: out of memory" in found.heard.notes
    assert "node 9 answers, and never joined: passed over" in found.heard.notes


def test_a_node_is_whose_key_it_holds(strategy) -> None:
    grid = FakeGrid({7: says("b"), 8: says("a"), 9: says("a")})  # 9 is not enrolled
    found = strategy(identify=lambda _: {7: "b", 8: "a"})
    found._join(grid)
    assert found._nodes == {"b": 7, "a": 8}
    liar = FakeGrid({7: says("a"), 8: says("a")})
    with refuses(FederationError, "the holder of client b's key says that it is client a"):
        strategy(identify=lambda _: {7: "b", 8: "a"})._join(liar)
    with refuses(FederationError, "1 of 2 clients joined; b did not"):
        strategy(identify=lambda _: {8: "a"})._join(grid)


def test_a_client_that_is_revoked_while_a_round_goes_on_is_not_heard(strategy) -> None:
    enrolled = {7: "b", 8: "a"}
    found = strategy(identify=lambda _: dict(enrolled))
    found._join(FakeGrid({7: says("b"), 8: says("a")}))
    report = Parcel(VALIDATE).pack()

    def answers(node: int, message: Message) -> Message:
        enrolled.pop(7, None)
        return Message(content=flower._wrap(report), reply_to=message)

    orders = list(found._messages({"a": b"", "b": b""}, "train", 1))
    reports = dict(found._reports(found._exchange(FakeGrid({7: answers, 8: answers}), "training", orders)))
    assert reports == {"a": report}
    assert "client b is enrolled no more, or not there: passed over" in found.heard.notes


def test_what_flower_tells_of_a_node_that_is_gone_is_told_by_its_clients_name(strategy) -> None:
    """Such a reply comes from the link, not from the node."""
    found = strategy(identify=lambda _: {7: "b", 8: "a"})
    found._join(FakeGrid({7: says("b"), 8: says("a")}))

    class Link(FakeGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            for reply in replies:
                reply.metadata.__dict__["_src_node_id"] = 1
            return replies

    orders = list(found._messages({"a": b"", "b": b""}, "train", 1))
    assert list(found._reports(found._exchange(Link({7: fails, 8: fails}), "training", orders))) == []
    assert {"client a failed: out of memory", "client b failed: out of memory"} <= set(found.heard.notes)


def test_an_engine_that_has_ended_is_not_waited_for(strategy) -> None:
    gone = threading.Event()
    gone.set()
    with refuses(FederationError, "the engine that carries the messages has ended"):
        strategy(3600.0, gone).start(FakeGrid({7: says("a"), 8: silent}))


@pytest.mark.parametrize(
    ("load", "module"), [(flower_settings.load_flower, "flower"), (flower_settings.load_link, "flower_link")]
)
def test_without_flower_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, load: Callable, module: str) -> None:
    import sys

    load()
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, f"pplr.runtimes.{module}")
    monkeypatch.delattr(f"pplr.runtimes.{module}")
    with refuses(ConfigError, "pip install 'pplr[flower]'"):
        load()


def test_nothing_of_flower_reports_or_installs() -> None:
    """In a fresh process whose environment says nothing of it."""
    import os
    import subprocess
    import sys

    look = (
        "import os; from pplr.runtimes import flower; from flwr.supercore import telemetry; "
        "from pplr.runtimes.flower_settings import QUIET; "
        "print(telemetry.FLWR_TELEMETRY_ENABLED, all(os.environ[name] == value for name, value in QUIET.items()))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in flower_settings.QUIET}
    told = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["0", "True"]
