"""The shells that Flower calls: its strategy and its client app. Nothing of the method is decided here.

Flower carries bytes (:mod:`pplr.runtimes.parcels`); :class:`~pplr.runtimes.orders.OrderDesk` writes the server's orders
and reads the reports, :class:`~pplr.runtimes.participant.Participant` answers them.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from pplr.runtimes.flower_settings import QUIET

os.environ |= QUIET  # read when flwr is imported

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from pplr.errors import FederationError, WireError
from pplr.progress import Progress
from pplr.runtimes.orders import OrderDesk, read_hello

__all__ = ["Answer", "OrderStrategy", "make_client_app"]

_T = TypeVar("_T")
Answer = Callable[[Context, bytes], bytes]
"""Answers an order as the client that a context belongs to."""

_RECORD, _KEY, _TYPE = "pplr", "parcel", "safetensors"
_POLL_S = 0.2
_LONGEST_JOIN_S = 600.0
_AT_ONCE = 16
"""Messages that are asked for or sent at once, and so lie in memory together."""


def _wrap(parcel: bytes) -> RecordDict:
    """Put bytes where Flower carries arrays, which it sends in chunks, however large."""
    array = Array(dtype="uint8", shape=(len(parcel),), stype=_TYPE, data=parcel)
    return RecordDict({_RECORD: ArrayRecord({_KEY: array})})


def _unwrap(message: Message, whose: str) -> bytes:
    """Take them out again.

    Raises:
        WireError: The message holds something else.
    """
    try:
        array = message.content.array_records[_RECORD][_KEY]
    except (KeyError, ValueError) as error:
        raise WireError(f"{whose} sent a message without a parcel", cure="Use pplr on both sides.") from error
    return bytes(array.data)


def make_client_app(answer: Answer) -> ClientApp:
    """Make the app that a node runs for every message.

    Args:
        answer: What is called with the bytes of an order, and returns those of the report.
    """
    app = ClientApp()

    def carry(message: Message, context: Context) -> Message:
        return Message(content=_wrap(answer(context, _unwrap(message, "the server"))), reply_to=message)

    app.query()(carry)
    app.train()(carry)
    app.evaluate()(carry)
    return app


class OrderStrategy(Strategy):
    """Flower's four verbs, each one call to the desk; every client is sent its own adapter.

    Args:
        names: All clients.
        greeting: The order that asks a client who it is.
        open_desk: Makes the desk, which writes the orders and reads the reports, of what the clients answer to the
            greeting; it raises where they do not belong together.
        deadline_s: Seconds that the reports of one exchange are waited for.
        progress: Told of every reply and every round.
        gone: Set when the engine that carries the messages has ended, so that nothing waits for it.
        identify: Says which of the grid's nodes is which enrolled client now, by the keys that nodes hold; a client
            that it names no more is not heard. Where absent, a node is who it says it is.
        join_s: Seconds that clients have to join; as long as for an exchange when absent.
    """

    def __init__(
        self,
        names: Sequence[str],
        greeting: bytes,
        open_desk: Callable[[Mapping[str, bytes]], OrderDesk],
        deadline_s: float,
        progress: Progress,
        gone: threading.Event | None = None,
        identify: Callable[[Grid], Mapping[int, str]] | None = None,
        join_s: float | None = None,
    ) -> None:
        self._names = tuple(names)
        self._greeting = greeting
        self._open_desk = open_desk
        self._desk: OrderDesk | None = None
        self._gone = gone or threading.Event()
        self._identify = identify
        self._known: Mapping[int, str] | None = None
        self._asked: dict[str, int] = {}
        self._deadline_s = deadline_s
        self._join_s = deadline_s if join_s is None else join_s
        self._progress = progress
        self._nodes: dict[str, int] = {}
        self._stands = False

    # -- the four verbs -----------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Order the participants to train."""
        return self._messages(self.desk.training_orders(), MessageType.TRAIN, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Mix what they trained; there is no one array that all share."""
        self._stands = self.desk.take_training(self._reports(replies))
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Order the clients whose adapter changed to validate it; nobody, where the round is to be repeated."""
        orders = self.desk.validation_orders() if self._stands else {}
        return self._messages(orders, MessageType.EVALUATE, server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Record and checkpoint the round."""
        if self._stands:
            self._progress.server_round(self.desk.take_validation(self._reports(replies)))
        return None

    def summary(self) -> None:
        """Say what is run."""
        self._progress.note(f"{self.desk.server.method.name} with {len(self._names)} clients through Flower")

    @property
    def desk(self) -> OrderDesk:
        """Writes the orders and reads the reports.

        Raises:
            FederationError: The clients have not joined yet.
        """
        if self._desk is None:
            raise FederationError("the clients have not joined yet", cure="Call start first.")
        return self._desk

    # -- the rounds that are left -------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Carry out the rounds that are left: a restored run goes on, and a round without enough reports is repeated.

        Args:
            grid: Where the nodes are reached.
            initial_arrays: Not used; clients start from the adapter that follows from the seed.
            num_rounds: Not used; the configuration says when the run ends.
            timeout: Not used; the configuration has a deadline.
            train_config: Not used.
            evaluate_config: Not used.
            evaluate_fn: Not used; only clients have cases to measure on.

        Raises:
            FederationError: A client does not join, or too few answer.
        """
        self._join(grid)
        self.summary()
        arrays, config = ArrayRecord(), ConfigRecord()
        while not self.desk.server.is_finished:
            number = self.desk.server.next_round + 1
            label = f"server round {number}, training"
            replies = self._exchange(grid, label, self.configure_train(number, arrays, config, grid))
            self.aggregate_train(number, replies)
            label = f"server round {number}, validation"
            replies = self._exchange(grid, label, self.configure_evaluate(number, arrays, config, grid))
            self.aggregate_evaluate(number, replies)
        return Result()

    def test(self, grid: Grid) -> Mapping[str, Mapping[str, object]]:
        """Order every client to write its best adapter and to test it; return what each tells."""
        messages = self._messages(self.desk.test_orders(), MessageType.EVALUATE, 0)
        return self.desk.take_tests(self._reports(self._exchange(grid, "testing", messages)))

    def _join(self, grid: Grid) -> None:
        """Wait for the nodes, ask each who it is, and open the desk."""
        nodes = self._wait_for_nodes(grid)
        greeting = _wrap(self._greeting)
        asked = [
            Message(content=greeting, message_type=MessageType.QUERY, dst_node_id=node, group_id="join")
            for node in nodes
        ]
        reports: dict[str, bytes] = {}
        for reply in self._exchange(grid, "greeting the clients", asked, self._join_s):
            node = reply.metadata.src_node_id
            known = None if self._known is None else self._known.get(node)
            whose = f"node {node}" if known is None else f"client {known}"
            if reply.has_error():
                raise FederationError(f"{whose} failed: {_reason(reply)}", cure="Look at that client's log.")
            report = _unwrap(reply, whose)
            name = read_hello(report, whose=whose)
            if known is not None and name != known:
                raise FederationError(
                    f"the holder of client {known}'s key says that it is client {name}",
                    cure="Start it with its own kit.",
                )
            if name not in self._names:
                raise FederationError(
                    f"a client says it is {name!r}; the run knows {', '.join(self._names)}",
                    cure="Give it the kit of one of them.",
                )
            if name in self._nodes:
                raise FederationError(f"two nodes say that they are client {name}", cure="Stop one of them.")
            self._nodes[name] = node
            reports[name] = report
        if missing := [name for name in self._names if name not in self._nodes]:
            raise FederationError(
                f"client {missing[0]} did not join" + (f", nor {len(missing) - 1} others" if missing[1:] else ""),
                cure="Start it, then go on with --resume.",
            )
        self._desk = self._open_desk({name: reports[name] for name in self._names})

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        """Wait until as many nodes are there as there are clients; of those that are identified, the enrolled alone."""
        until = time.monotonic() + min(self._join_s, _LONGEST_JOIN_S)
        while True:
            nodes = sorted(grid.get_node_ids())
            if self._identify is not None:
                self._known = self._identify(grid)
                nodes = [node for node in nodes if self._known.get(node) in self._names]
            if len(nodes) >= len(self._names):
                return nodes
            if time.monotonic() > until:
                there = [self._known[node] for node in nodes] if self._known is not None else []
                missing = ", ".join(name for name in self._names if name not in there) if there else ""
                raise FederationError(
                    f"{len(nodes)} of {len(self._names)} clients joined" + (f"; {missing} did not" if missing else ""),
                    cure="Start the others, then go on with --resume.",
                )
            self._wait()

    # -- messages -----------------------------------------------------------------------------------------------

    def _messages(self, orders: Mapping[str, bytes], kind: str, server_round: int) -> Iterator[Message]:
        for name, order in orders.items():
            node = self._nodes[name]
            yield Message(content=_wrap(order), message_type=kind, dst_node_id=node, group_id=str(server_round))

    def _exchange(
        self, grid: Grid, label: str, messages: Iterable[Message], within_s: float | None = None
    ) -> Iterator[Message]:
        """Send messages, and hand each reply on as it comes, until all are there or the deadline is over."""
        self._asked = {}
        for some in _batches(messages):
            pushed = grid.push_messages(some)
            for one, message in zip(pushed, some, strict=False):
                if one is None:  # the link did not take it, as when the node has gone meanwhile
                    self._progress.note(f"node {message.metadata.dst_node_id} could not be sent its order")
                else:
                    self._asked[one] = message.metadata.dst_node_id
        left = set(self._asked)
        until = time.monotonic() + (self._deadline_s if within_s is None else within_s)
        with self._progress.task(label, len(left), "clients") as advance:
            while left and time.monotonic() < until:
                for asked in _batches(sorted(left)):
                    replies = list(grid.pull_messages(asked))
                    if replies and self._identify is not None:
                        self._known = self._identify(grid)
                    for reply in replies:
                        left.discard(reply.metadata.reply_to_message_id)
                        yield reply
                        advance(1)
                if left:
                    self._wait()

    def _wait(self) -> None:
        if self._gone.wait(_POLL_S):
            raise FederationError("the engine that carries the messages has ended", cure="Go on with --resume.")

    def _reports(self, replies: Iterable[Message]) -> Iterator[tuple[str, bytes]]:
        """Take the bytes out of replies, each with the name under which its node joined."""
        names = {node: name for name, node in self._nodes.items()}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in names and reply.has_error():  # of Flower itself, for a node that does not answer
                node = self._asked.get(reply.metadata.reply_to_message_id, node)
            name = names.get(node)
            if name is None:
                self._progress.note(f"node {node} answers, and never joined: passed over")
            elif self._known is not None and self._known.get(node) != name:
                self._progress.note(f"client {name} is enrolled no more, or not there: passed over")
            elif reply.has_error():
                self._progress.note(f"client {name} failed: {_reason(reply)}")
            else:
                try:
                    report = _unwrap(reply, f"client {name}")
                except WireError as error:
                    self._progress.note(str(error))
                else:
                    yield name, report


def _batches(things: Iterable[_T]) -> Iterator[list[_T]]:
    """Take a few at a time, so that the others need not have been made yet."""
    source = iter(things)
    while some := list(itertools.islice(source, _AT_ONCE)):
        yield some


def _reason(reply: Message) -> str:
    """Put what Flower tells of a failure into one line."""
    return " ".join((reply.error.reason or f"code {reply.error.code}").split())[:500]
