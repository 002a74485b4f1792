"""Several clients in one pass of a stage server, against one at a time, and what one of them can do to the others."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pplr.config import AdapterConfig, StatePrivacyConfig, TrainingConfig
from pplr.errors import PplrError, ServerLostError, TransportError
from pplr.privacy.states import StateGuard
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.identity import enroll_client, init_federation, read_kit, read_server
from pplr.runtimes.meetings import Guest, Meetings
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_client import GrpcTransport
from pplr.runtimes.stage_server import ServerLimits, StageServer
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.host import StageHost
from pplr.stages.model import CutModel
from pplr.testing import random_adapter, same_state, tiny_backbone, tiny_catalog, tiny_samples

NAMES = ("one", "two", "three")
PLAN = CutPlan(1, 1, 4)
ADAPTER = AdapterConfig(rank=2, dropout=0.2)
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=1)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    init_federation(folder / "ca", "trees", ["localhost"], address="localhost:1")
    for name in NAMES:
        enroll_client(folder / "ca", name, folder / name)
    return folder


@pytest.fixture
def serve(federation: Path) -> Iterator[Callable[..., StageServer]]:
    with contextlib.ExitStack() as stack:

        def start(together: int = 3, patience_s: float = 20.0) -> StageServer:
            limits = ServerLimits(together=together)
            server = StageServer(tiny_backbone(), read_server(federation / "ca"), "localhost:0", limits)
            server._batcher.meetings.patience_s = patience_s
            server._batcher.meetings.took = lambda _: None  # type: ignore[method-assign]  # so that tests meet for sure
            server.start()
            stack.callback(server.stop, 0.0)
            return server

        yield start


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Tell how many clients were in each pass of several."""
    seen: list[tuple[str, int]] = []
    for direction in ("forward", "backward"):
        own = getattr(StageHost, f"{direction}_together")
        monkeypatch.setattr(StageHost, f"{direction}_together", _spying(own, direction, seen))
    return seen


def _spying(own: Any, direction: str, seen: list[tuple[str, int]]) -> Any:
    def spy(host: Any, asked: Sequence[Any]) -> Any:
        seen.append((direction, len(asked)))
        return own(host, asked)

    return spy


def connect(server: StageServer, kit: Path, in_flight: int = 1) -> ClientModel:
    backbone = tiny_backbone()

    def transport(tenant: str, plan: CutPlan) -> GrpcTransport:
        channel = StageChannel(f"localhost:{server.port}", read_kit(kit), timeout_s=30.0, patience_s=0.0)
        return GrpcTransport(
            channel, tenant, plan, base_sha256=backbone.fingerprint(), width=32, adapter=ADAPTER, training=TRAINING
        )

    cut = CutModel(backbone, PLAN, ADAPTER, TRAINING, connect=transport, in_flight=in_flight)
    return cut.client("main", random_adapter(cut.shapes, seed=len(kit.name), scale=0.1))


def batches(model: ClientModel, number: int) -> list[Any]:
    encoded = model.backbone.encode(tiny_samples(), tiny_catalog(), 3)
    return [model.backbone.collate(encoded[start : start + number + 1]) for start in (0, 2, 3)]


def steps(model: ClientModel, number: int, barrier: threading.Barrier | None = None) -> list[float]:
    losses = []
    for step, batch in enumerate(batches(model, number)):
        if barrier is not None:
            barrier.wait(30)
        loss = model.train_loss(batch, 10 * number + step)
        (loss / batch.targets).backward()
        model.optimizer_step(0.5)
        losses.append(float(loss.detach()))
    return losses


def assert_trained_alike(
    models: Sequence[ClientModel],
    losses: Sequence[Sequence[float]],
    alone: Sequence[ClientModel],
    wanted: Sequence[Sequence[float]],
) -> None:
    for own, found, other, expected in zip(models, losses, alone, wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        one, two = own.adapter(), other.adapter()
        for name in two:
            assert float((one[name] - two[name]).abs().max()) < 1e-4, name


def begun(server: StageServer, federation: Path) -> list[ClientModel]:
    models = [connect(server, federation / name) for name in NAMES]
    for model in models:
        model.begin_round(10)
    return models


def test_training_together_is_training_one_at_a_time(federation, serve, sizes) -> None:
    alone = begun(serve(together=1), federation)
    wanted = [steps(model, number) for number, model in enumerate(alone)]
    assert not sizes
    models, barrier = begun(serve(), federation), threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda own: steps(own[1], own[0], barrier), enumerate(models)))
    assert sizes == [("forward", 3), ("backward", 3)] * 3
    assert_trained_alike(models, found, alone, wanted)


def test_some_of_them_want_no_gradient_back(federation, serve, sizes) -> None:
    """Over the network, in one pass: what nobody uses is not sent, and what is trained is trained alike."""

    def take_steps(models: Sequence[ClientModel], barrier: threading.Barrier | None = None) -> list[Any]:
        for model in models[:2]:
            for parameter in model.input_member.parameters.values():
                parameter.requires_grad_(False)
        with ThreadPoolExecutor(3 if barrier else 1) as pool:
            return list(pool.map(lambda own: steps(own[1], own[0], barrier), enumerate(models)))

    alone, models = begun(serve(together=1), federation), begun(serve(), federation)
    wanted, found = take_steps(alone), take_steps(models, threading.Barrier(3))
    assert sizes == [("forward", 3), ("backward", 3)] * 3
    assert_trained_alike(models, found, alone, wanted)
    for number in range(3):
        traffic = models[number].traffic
        assert traffic == alone[number].traffic
        assert traffic.bytes_up == (2 * traffic.bytes_down if number < 2 else traffic.bytes_down)


def drawn(rows: int, tokens: int) -> Tensor:
    return torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(rows + tokens))


def exchange(transport: Any, name: str, states: Tensor, spoil: Any = None, **fields: Any) -> Tensor:
    """Send states of full length; ``spoil`` may change the message, as no honest client would."""
    lengths = torch.full((states.shape[0],), states.shape[1])
    message = codec.encode_states(states, lengths, codec.Wire.FLOAT32)
    if spoil is not None:
        spoil(message)
    kind = {"Forward": pb.ForwardRequest, "Backward": pb.BackwardRequest}[name]
    more = {"keep": True, "adapter": True} if name == "Forward" else {}
    request = kind(header=transport._header(), states=message, step=fields.pop("step", 1), **more, **fields)
    reply = transport._exchange(name, request, pb.StatesReply)
    return codec.decode_states(reply.states, transport._limits, dtype=torch.float32, device="cpu")[0]


def not_a_number(message: Any) -> None:
    message.data = (drawn(2, 4) * torch.nan).numpy().tobytes()


def too_long(message: Any) -> None:
    message.tokens = 2000


def cut_short(message: Any) -> None:
    message.data = message.data[:-8]


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except PplrError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


@pytest.mark.parametrize("spoil", [not_a_number, too_long, cut_short])
@pytest.mark.parametrize("name", ["Forward", "Backward"])
def test_a_bad_message_fails_alone(federation, serve, sizes, name, spoil) -> None:
    states = [drawn(1, 5), drawn(2, 4), drawn(3, 6)]
    alone = [model.transport for model in begun(serve(together=1), federation)]
    wanted = []
    for transport, own in zip(alone, states, strict=True):
        wanted.append([exchange(transport, "Forward", own), exchange(transport, "Backward", own)])
    transports = [model.transport for model in begun(serve(patience_s=1.0), federation)]
    before = transports[1].adapter()
    if name == "Backward":
        at_once([lambda t=t, s=s: exchange(t, "Forward", s) for t, s in zip(transports, states, strict=True)])
        assert sizes.pop(0) == ("forward", 3)
    bad = [None, spoil, None]
    found = at_once([lambda i=i: exchange(transports[i], name, states[i], bad[i]) for i in range(3)])
    assert isinstance(found[1], TransportError)
    assert not isinstance(found[1], ServerLostError)
    at = 0 if name == "Forward" else 1
    for number in (0, 2):
        torch.testing.assert_close(found[number], wanted[number][at], rtol=1e-5, atol=1e-5)
    again = exchange(transports[1], name, states[1])  # the same number of the sequence: the refusal did not count
    torch.testing.assert_close(again, wanted[1][at], rtol=1e-5, atol=1e-5)
    assert same_state(transports[1].adapter(), before)
    norms = [transport.gradient_norm_squared() for transport in transports]
    assert norms[1] == (pytest.approx(alone[1].gradient_norm_squared(), rel=1e-4) if name == "Backward" else 0.0)


def test_an_adapter_that_overflows_fails_alone(federation, serve, sizes) -> None:
    states = [drawn(1, 5), drawn(2, 4), drawn(3, 6)]
    alone = [model.transport for model in begun(serve(together=1), federation)]
    transports = [model.transport for model in begun(serve(), federation)]
    huge = {key: tensor.sign() * 1e30 for key, tensor in transports[1].adapter().items()}
    transports[1].set_adapter(huge)
    found = at_once([lambda i=i: exchange(transports[i], "Forward", states[i]) for i in range(3)])
    assert sizes == [("forward", 3)]
    assert isinstance(found[1], TransportError)
    for number in (0, 2):
        own = exchange(alone[number], "Forward", states[number])
        torch.testing.assert_close(found[number], own, rtol=1e-5, atol=1e-5)


def test_one_that_goes_away_takes_nothing_from_the_others(federation, serve, sizes) -> None:
    states = [drawn(1, 5), drawn(2, 4), drawn(3, 6)]
    alone = [model.transport for model in begun(serve(together=1), federation)]
    server = serve(patience_s=2.0)
    transports = [model.transport for model in begun(server, federation)]
    for own in (alone[0], alone[2]):
        at = 0 if own is alone[0] else 2
        exchange(own, "Forward", states[at])
        exchange(own, "Backward", states[at])
    at_once([lambda i=i: exchange(transports[i], "Forward", states[i]) for i in range(3)])
    transports[1].leave()
    at_once([lambda i=i: exchange(transports[i], "Backward", states[i]) for i in (0, 2)])
    assert sizes == [("forward", 3), ("backward", 2)]
    for number in (0, 2):
        norm = transports[number].gradient_norm_squared()
        assert norm == pytest.approx(alone[number].gradient_norm_squared(), rel=1e-4)


def test_one_that_never_comes_is_waited_for_once(federation, serve, sizes) -> None:
    server = serve(patience_s=0.5)
    transports = [model.transport for model in begun(server, federation)]
    for step in (1, 2):
        at_once([lambda i=i: exchange(transports[i], "Forward", drawn(1, 4), step=step) for i in (0, 1)])  # noqa: B023
    assert sizes == [("forward", 2)] * 2
    assert server._batcher.meetings._absent == {"three"}


def test_a_repeated_request_gets_the_same_reply(federation, serve, sizes) -> None:
    transports = [model.transport for model in begun(serve(), federation)]
    found = at_once([lambda t=t: exchange(t, "Forward", drawn(1, 4)) for t in transports])
    one = transports[0]
    one._sequence -= 1
    assert torch.equal(exchange(one, "Forward", drawn(1, 4)), found[0])
    assert sizes == [("forward", 3)]


def test_what_a_pass_of_several_may_hold_is_bounded() -> None:
    meetings = Meetings(most=3, most_tokens=100)
    everybody = frozenset({"a", "b", "c", "d"})
    first = meetings.attend("key", Guest("a", 60, None), everybody)
    second = meetings.attend("key", Guest("b", 60, None), everybody)
    assert first is not second
    assert first.full.is_set()
    assert meetings.attend("key", Guest("c", 10, None), everybody) is second
    assert meetings.attend("key", Guest("b", 1, None), everybody) is not second  # one call of each client
    assert meetings.attend("other key", Guest("d", 1, None), everybody) not in (first, second)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("in_flight", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_micro_batches_in_flight_have_the_same_bits(federation, serve, in_flight, count, guarded) -> None:
    backbone = tiny_backbone()
    local = CutModel(backbone, PLAN, ADAPTER, TRAINING, in_flight=in_flight)
    start = random_adapter(local.shapes, seed=3, scale=0.1)
    server = serve(together=1)
    models = [connect(server, federation / "one"), connect(server, federation / "two", in_flight)]
    models.append(local.client("local", start))
    noise = StatePrivacyConfig(
        clip_norm=1, noise="gaussian", noise_multiplier=0.3, gradient_clip_norm=0.1, gradient_noise_multiplier=0.3
    )
    losses = []
    for model in models:
        model.guard = StateGuard(noise, bytes(32), "client") if guarded else None
        model.set_adapter(start)
        model.begin_round(10)
        encoded = backbone.encode(tiny_samples(), tiny_catalog(), 3)
        parts = [backbone.collate(encoded[own : own + 2]) for own in range(count)]
        losses.append([])
        for step in range(2):
            losses[-1].append(model.train_batch(parts, [100 * step + own for own in range(count)]))
            model.optimizer_step(0.5)
    assert losses[0] == losses[1] == losses[2]
    for model in models[1:]:
        assert same_state(model.adapter(), models[0].adapter())
        assert same_state(model.optimizer_state(), models[0].optimizer_state())
        assert model.traffic == models[0].traffic


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failure_ends_the_flight(federation, serve, monkeypatch, where) -> None:
    model = connect(serve(together=1), federation / "one", in_flight=3)
    model.begin_round(10)
    own, calls = getattr(model.transport, where), []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise TransportError("it broke", cure="Mend it.")
        return own(*args, **options)

    monkeypatch.setattr(model.transport, where, failing)
    encoded = model.backbone.encode(tiny_samples(), tiny_catalog(), 3)
    parts = [model.backbone.collate(encoded[first : first + 1]) for first in range(6)]
    with pytest.raises(TransportError, match="it broke"):
        model.train_batch(parts, list(range(6)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cut")]
    model.transport.discard()
    monkeypatch.undo()
    for member in model._members:
        member.optimizer.clear_gradients()
    model.train_batch(parts, list(range(6)))
    assert model.optimizer_step(0.5) > 0
