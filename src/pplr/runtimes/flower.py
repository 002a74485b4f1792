"""The shells that Flower calls: its strategy and its client app. Nothing of the method is decided here.

Flower carries bytes (:mod:`pplr.runtimes.parcels`); :class:`~pplr.runtimes.orders.OrderDesk` writes the server's orders
and reads the reports, :class:`~pplr.runtimes.participant.Participant` answers them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping

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

Answer = Callable[[Context, bytes], bytes]
"""Answers an order as the client that a context belongs to."""

_RECORD, _KEY, _TYPE = "pplr", "parcel", "safetensors"
_POLL_S = 0.2
_JOIN_S = 600.0


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
        desk: Writes the orders and reads the reports.
        deadline_s: Seconds that the reports of one exchange are waited for.
        progress: Told of every reply and every round.
        gone: Set when the engine that carries the messages has ended, so that nothing waits for it.
    """

    def __init__(
        self, desk: OrderDesk, deadline_s: float, progress: Progress, gone: threading.Event | None = None
    ) -> None:
        self.desk = desk
        self._gone = gone or threading.Event()
        self._deadline_s = deadline_s
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
        server = self.desk.server
        self._progress.note(f"{server.method.name} with {len(server.names)} clients through Flower")

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
        self.summary()
        self._join(grid)
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
        """Wait for the nodes, ask each who it is, and check that it starts from the same as the server."""
        names = self.desk.server.names
        until = time.monotonic() + min(self._deadline_s, _JOIN_S)
        nodes: list[int] = []
        while len(nodes) < len(names):
            nodes = sorted(grid.get_node_ids())
            if time.monotonic() > until:
                raise FederationError(
                    f"{len(nodes)} of {len(names)} clients joined", cure="Start the others, then go on with --resume."
                )
            self._wait()
        greeting = _wrap(self.desk.greeting())
        asked = [
            Message(content=greeting, message_type=MessageType.QUERY, dst_node_id=node, group_id="join")
            for node in nodes
        ]
        for reply in self._exchange(grid, "greeting the clients", asked):
            whose = f"node {reply.metadata.src_node_id}"
            if reply.has_error():
                raise FederationError(f"{whose} failed: {_reason(reply)}", cure="Look at that client's log.")
            report = _unwrap(reply, whose)
            name = read_hello(report, whose=whose)
            self.desk.greet(name, report)
            if name in self._nodes:
                raise FederationError(f"two nodes say that they are client {name}", cure="Stop one of them.")
            self._nodes[name] = reply.metadata.src_node_id
        if missing := [name for name in names if name not in self._nodes]:
            raise FederationError(
                f"client {missing[0]} did not join" + (f", nor {len(missing) - 1} others" if missing[1:] else ""),
                cure="Start it, then go on with --resume.",
            )

    # -- messages -----------------------------------------------------------------------------------------------

    def _messages(self, orders: Mapping[str, bytes], kind: str, server_round: int) -> list[Message]:
        return [
            Message(content=_wrap(order), message_type=kind, dst_node_id=self._nodes[name], group_id=str(server_round))
            for name, order in orders.items()
        ]

    def _exchange(self, grid: Grid, label: str, messages: Iterable[Message]) -> list[Message]:
        """Send messages and wait for the replies until all are there, or the deadline is over."""
        sent = list(messages)
        replies: list[Message] = []
        with self._progress.task(label, len(sent), "clients") as advance:
            left = set(grid.push_messages(sent))
            until = time.monotonic() + self._deadline_s
            while left and time.monotonic() < until:
                for reply in grid.pull_messages(left):
                    left.discard(reply.metadata.reply_to_message_id)
                    replies.append(reply)
                    advance(1)
                if left:
                    self._wait()
        return replies

    def _wait(self) -> None:
        if self._gone.wait(_POLL_S):
            raise FederationError("the engine that carries the messages has ended", cure="Go on with --resume.")

    def _reports(self, replies: Iterable[Message]) -> dict[str, bytes]:
        """Take the bytes out of replies, by the name under which each node joined."""
        names = {node: name for name, node in self._nodes.items()}
        found = {}
        for reply in replies:
            name = names.get(reply.metadata.src_node_id)
            if name is None:
                self._progress.note(f"node {reply.metadata.src_node_id} answers, and never joined: passed over")
            elif reply.has_error():
                self._progress.note(f"client {name} failed: {_reason(reply)}")
            else:
                try:
                    found[name] = _unwrap(reply, f"client {name}")
                except WireError as error:
                    self._progress.note(str(error))
        return found


def _reason(reply: Message) -> str:
    """Put what Flower tells of a failure into one line."""
    return " ".join((reply.error.reason or f"code {reply.error.code}").split())[:500]
