"""Clients and strangers who mean harm: each is refused by a typed error, and nobody else's state changes by a bit.

Every attack goes through :func:`check_withstands`. Beside the attacker there is a victim in the midst of its work: an
adapter and an optimizer that were trained, a forward pass that waits for its gradient, a cache in use. After the attack
all of it is bitwise what it was, and the victim goes on to the very results of an undisturbed server. That the check
can see a leak is shown by servers that are broken on purpose, for which it fails.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import random
import runpy
import shutil
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pplr.backbones.base import load_backbone
from pplr.backbones.bundles import write_bundles
from pplr.backbones.slots import AdapterSlots
from pplr.config import AdapterConfig, BackboneConfig, TrainingConfig
from pplr.errors import PplrError, ServerLostError, TransportError, WireError
from pplr.runtimes import codec, framing, identity, stage_server
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.certificates import Pair, new_authority, read_pair
from pplr.runtimes.codec import Wire
from pplr.runtimes.framing import PROTOCOL, SERVICE, frames, joined, parsed
from pplr.runtimes.identity import Kit, enroll_client, init_federation, read_kit, read_server, revoke
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_client import GrpcTransport
from pplr.runtimes.stage_server import ServerLimits, StageServer
from pplr.runtimes.stage_sessions import Session
from pplr.runtimes.stage_tenancies import Tenancies
from pplr.runtimes.turns import Turns
from pplr.stages.cut import CutPlan
from pplr.stages.optimizer import LocalObjective
from pplr.stages.stage import StageCall
from pplr.testing import random_adapter, refuses, tiny_backbone, tiny_decoder, tiny_tokenizer

S = grpc.StatusCode
PLAN = CutPlan(1, 1, 4)
ADAPTER = AdapterConfig(rank=2, dropout=0.2)
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=0)
VICTIM, ATTACKER = "victim", "attacker"
SEEDS = {VICTIM: 1, ATTACKER: 2}
BACKBONE = tiny_backbone()
BASE, WIDTH = BACKBONE.fingerprint(), BACKBONE.hidden_size
MAIN = "main"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    init_federation(folder / "ca", "trees", ["localhost", "127.0.0.1"], address="localhost:1")
    for name, days in ((VICTIM, 365), (ATTACKER, 10), ("third", 365)):
        enroll_client(folder / "ca", name, folder / name, days=days)
    enroll_client(folder / "ca", "olga", folder / "operator", role="operator")
    return folder


# -- a client at work, and what a server has of it -------------------------------------------------------------


class Party:
    """A client in the midst of its work: trained, with a pass that waits for its gradient and a cache in use."""

    def __init__(self, server: StageServer, kit: Kit, base: str = BASE) -> None:
        self.channel = StageChannel(f"localhost:{server.port}", kit, timeout_s=10.0, patience_s=0.0)
        self.name = kit.name
        self.begin(base)

    def begin(self, base: str = BASE) -> None:
        """Say hello, and work."""
        seed = SEEDS.get(self.name, 3)
        self.transport = GrpcTransport(
            self.channel, MAIN, PLAN, base_sha256=base, width=WIDTH, adapter=ADAPTER, training=TRAINING
        )
        draw = torch.Generator().manual_seed(seed)
        self.states = torch.randn(6, 5, WIDTH, generator=draw)
        own = self.transport
        own.set_adapter(random_adapter({name: tuple(t.shape) for name, t in own.adapter().items()}, seed))
        own.begin_round(5, LocalObjective(), None)
        self.lengths = torch.tensor([5, 3])
        self._pass(1)
        own.backward(1, self.states[2:4], self.lengths)
        own.gradient_norm_squared()
        own.optimizer_step(1.0)
        self._pass(2)
        self.cache = own.open_cache()
        self.mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
        own.decode(self.states[:2, :4], StageCall(attention_mask=self.mask), self.cache)

    def _pass(self, step: int) -> None:
        self.transport.forward(self.states[:2], self.lengths, StageCall(dropout_seed=step), keep_as=step)

    def header(self, ahead: int = 1) -> Any:
        """Write the header of the next request, without counting it."""
        return pb.Header(session=self.transport._session, sequence=self.transport._sequence + ahead)

    def send(self, method: str, request: Any, *, timeout: float = 10.0) -> bytes:
        """Call without any of the client's care."""
        return send(self.channel._channel, method, request, timeout=timeout)

    def go_on(self) -> dict[str, torch.Tensor]:
        """Use everything that the server keeps of it, and return what comes of it."""
        own, rows = self.transport, torch.tensor([1, 0, 1])
        told = {"gradient": own.backward(2, self.states[4:6], self.lengths)}
        told["norm"] = torch.tensor(own.gradient_norm_squared(), dtype=torch.float64)
        own.optimizer_step(0.5)
        own.reorder_cache(self.cache, rows)
        longer = torch.cat([self.mask[rows], torch.ones(3, 1, dtype=torch.long)], dim=1)
        told["decoded"] = own.decode(self.states[:3, 4:5], StageCall(attention_mask=longer), self.cache)
        told["states"] = own.forward(self.states[:2], self.lengths, StageCall(), keep_as=None)
        own.close_cache(self.cache)
        own.end_round()
        return told | own.adapter() | own.optimizer_state()


def send(channel: grpc.Channel, method: str, request: Any, *, timeout: float = 10.0) -> bytes:
    content = request if isinstance(request, bytes) else request.SerializeToString()
    return joined(channel.stream_stream(f"/{SERVICE}/{method}")(frames(content), timeout=timeout), 2**24)


def remains(server: StageServer, client: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Copy everything that a server has of a client, in numbers and in tensors."""
    told: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for session in server.tenancies.of(client):
        tenancy = session.host._tenancies[session.name]
        own = session.owner.tenant
        told[own] = (
            session.number, session.sequence, session.reply, session.wire, session.in_round, dict(session.kept),
            session.kept_tokens, {n: (c.tokens, c.lengths) for n, c in session.caches.items()},
            sorted(tenancy.kept), sorted(tenancy.caches), session.settings,
        )  # fmt: skip
        found = dict(session.state())
        found |= {f"gradient of {name}": p.grad for name, p in tenancy.member.parameters.items() if p.grad is not None}
        for step, (entering, leaving) in tenancy.kept.items():
            found |= {f"entering {step}": entering, f"leaving {step}": leaving}
        for number, cache in tenancy.caches.items():
            for layer, held in enumerate(cache.layers):
                if held.keys is not None:
                    found |= {f"keys {number}.{layer}": held.keys, f"values {number}.{layer}": held.values}
        tensors |= {f"{own}: {name}": tensor.detach().clone() for name, tensor in found.items()}
    return told, tensors


def check_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], whose: str) -> None:
    assert one.keys() == other.keys(), f"{whose} has {sorted(one.keys() ^ other.keys())} more or less"
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{whose}: {name} changed"


class World:
    """A server with a victim and an attacker, both at work."""

    def __init__(self, server: StageServer, folder: Path, base: str = BASE) -> None:
        self.server, self.folder, self.base = server, folder, base
        self.parties = {name: Party(server, read_kit(folder / name), base) for name in (VICTIM, ATTACKER)}
        self.victim, self.attacker = self.parties[VICTIM], self.parties[ATTACKER]
        self.names = list(server.tenancies.of(ATTACKER)[0].host.stage.shapes)

    def begin_anew(self) -> None:
        """Bring both to where they were, and let go of whatever else there is."""
        for session in self.server.tenancies.all():
            self.server.tenancies.dismiss(session.owner)
        for party in self.parties.values():
            party.begin(self.base)

    def close(self) -> None:
        for party in self.parties.values():
            party.channel.close()

    # What the attacker sends, each with the header that would be right.

    def head(self, ahead: int = 1) -> Any:
        return self.attacker.header(ahead)

    def send(self, method: str, request: Any) -> bytes:
        return self.attacker.send(method, request)

    def hello(self, tenant: str = MAIN, **changes: Any) -> Any:
        fields = {
            "version": PROTOCOL, "base_sha256": self.base, "input_layers": 1, "output_layers": 1, "total_layers": 4,
            "wires": [pb.WIRE_FLOAT32], "adapter_json": ADAPTER.model_dump_json(), "tenant": tenant,
            "training_json": TRAINING.model_dump_json(), "attempt": random.getrandbits(62) + 1,
        }  # fmt: skip
        return pb.HelloReply.FromString(self.send("Hello", pb.HelloRequest(**(fields | changes))))

    def forward(self, message: Any, *, step: int = 9, keep: bool = True, **more: Any) -> bytes:
        return self.send("Forward", pb.ForwardRequest(header=self.head(), states=message, step=step, keep=keep, **more))

    def backward(self, message: Any, step: int = 2) -> bytes:
        return self.send("Backward", pb.BackwardRequest(header=self.head(), states=message, step=step))

    def decode(self, message: Any, **changes: Any) -> bytes:
        fields = {"cache": self.attacker.cache, "total_tokens": 5, "total_lengths": [5, 4]}
        return self.send("Decode", pb.DecodeRequest(header=self.head(), states=message, **(fields | changes)))

    def append(self, **changes: Any) -> bytes:
        fields = {"cache": self.attacker.cache, "other": self.attacker.cache, "rows": [0]}
        return self.send("AppendRows", pb.AppendRequest(header=self.head(), **(fields | changes)))

    def round(self, **changes: Any) -> bytes:
        fields: dict[str, Any] = {"total_steps": 5, "train_a": True}
        return self.send("BeginRound", pb.BeginRoundRequest(header=self.head(), **(fields | changes)))

    def tensors(self, method: str, tensors: Any) -> bytes:
        message = tensors if isinstance(tensors, pb.Tensors) else codec.encode_tensors(tensors)
        return self.send(method, pb.TensorsRequest(header=self.head(), tensors=message))

    def optimizer(self, prefix: str, value: Any) -> bytes:
        """Write an optimizer back with all tensors of a kind spoilt."""
        state = self.server.tenancies.of(ATTACKER)[0].host.optimizer_state(f"{ATTACKER}/{MAIN}")
        assert any(name.startswith(prefix) for name in state)
        return self.tensors(
            "RestoreOptimizer",
            {name: value(tensor.clone()) if name.startswith(prefix) else tensor for name, tensor in state.items()},
        )


@pytest.fixture
def start(federation: Path) -> Iterator[Callable[..., World]]:
    """Start a server, with a victim and an attacker at work."""
    with contextlib.ExitStack() as stack:

        def make(
            limits: ServerLimits | None = None, *, ca: Path | None = None, backbone: Any = BACKBONE, **options: Any
        ) -> World:
            server = StageServer(backbone, read_server(ca or federation / "ca"), "localhost:0", limits, **options)
            server.start()
            stack.callback(server.stop, 0.0)
            world = World(server, federation, backbone.fingerprint())
            stack.callback(world.close)
            return world

        yield make


@pytest.fixture(scope="module")
def shared(federation: Path) -> Iterator[World]:
    """One server for all attacks on what every server grants."""
    server = StageServer(BACKBONE, read_server(federation / "ca"), "localhost:0")
    server.start()
    world = World(server, federation)
    yield world
    world.close()
    server.stop(0.0)


@pytest.fixture(scope="module")
def expected(federation: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What each comes to on a server that nobody else uses."""
    told = {}
    for name in SEEDS:
        server = StageServer(BACKBONE, read_server(federation / "ca"), "localhost:0")
        server.start()
        party = Party(server, read_kit(federation / name))
        told[name] = party.go_on()
        party.channel.close()
        server.stop(0.0)
    assert not torch.equal(told[VICTIM]["decoded"], told[ATTACKER]["decoded"])
    return told


def check_withstands(
    world: World,
    expected: dict[str, dict[str, torch.Tensor]],
    attack: Callable[[World], Any],
    answers: Any,
    *,
    own: bool = True,
) -> None:
    """Attack, and see that it was answered by one of these errors and that nobody noticed.

    Args:
        world: The server, its victim and its attacker.
        expected: What each comes to undisturbed.
        attack: What the attacker does.
        answers: gRPC's codes, or classes of pplr's errors, of which one must end it; none if it may succeed.
        own: Whether the attacker's own tenancy must be as it was too.
    """
    spared = [VICTIM, ATTACKER] if own else [VICTIM]
    before = {name: remains(world.server, name) for name in spared}
    seen: Any = None
    try:
        attack(world)
    except (grpc.RpcError, PplrError) as error:
        seen = error
    kind = seen.code() if isinstance(seen, grpc.RpcError) else type(seen) if seen is not None else None
    wanted = answers if isinstance(answers, tuple) else (answers,)
    assert kind in wanted, f"answered by {kind}: {seen}"
    if isinstance(seen, grpc.RpcError):
        assert "\n" not in (seen.details() or ""), seen
    for name in spared:
        told, tensors = before[name]
        after, now = remains(world.server, name)
        check_same(tensors, now, name)
        assert told == after, f"{name}: {told} became {after}"
    for name in spared:
        check_same(expected[name], world.parties[name].go_on(), name)


# -- what the attacker sends -------------------------------------------------------------------------------------


def states(real: tuple[int, ...] = (5, 3), *, wire: Wire = Wire.FLOAT32, left: bool = False, **changes: Any) -> Any:
    """Write states of so many real tokens that are fine, and then what is not."""
    draw = torch.Generator().manual_seed(7)
    whole = torch.randn(len(real), max(real), WIDTH, generator=draw)
    message = codec.encode_states(whole, torch.tensor(real), wire, padded_left=left)
    for name, value in changes.items():
        if name == "lengths":
            del message.lengths[:]
            message.lengths.extend(value)
        else:
            setattr(message, name, value)
    return message


def spoilt(value: float, **options: Any) -> Any:
    """Write states with one number that no training would send."""
    message = states(**options)
    data = bytearray(message.data)
    data[400:404] = struct.pack("<f", value)
    message.data = bytes(data)
    return message


def form(wire: int) -> Any:
    message = states()
    message.wire = wire
    return message


def scaled(value: float) -> Any:
    """Write int8 states with a scale that no client would send."""
    message = states(wire=Wire.INT8)
    message.scales = struct.pack("<f", value) + message.scales[4:]
    return message


def named(name: str, shape: tuple[int, ...], data: bytes = b"", dtype: Any = pb.DTYPE_FLOAT32) -> Any:
    return pb.Tensors(tensors=[pb.NamedTensor(name=name, dtype=dtype, shape=shape, data=data)])


def number(field: int, form: int) -> bytes:
    return bytes([field << 3 | form])


def within(field: int, content: bytes) -> bytes:
    """Write a protobuf field by hand."""
    size, told = len(content), b""
    while size > 127:
        told, size = told + bytes([size & 127 | 128]), size >> 7
    return number(field, 2) + told + bytes([size]) + content


def head_of(world: World) -> bytes:
    return within(1, world.head().SerializeToString())


NAN, INF = math.nan, math.inf
WRONG = S.INVALID_ARGUMENT
LATE = S.OUT_OF_RANGE
STATE = S.FAILED_PRECONDITION
FULL = S.RESOURCE_EXHAUSTED
STRANGE = S.NOT_FOUND
HUGE = 2**32 - 1

CASES: dict[str, tuple[Any, Callable[[World], Any], ServerLimits | None]] = {}


def case(name: str, answers: Any, attack: Callable[[World], Any], **limits: Any) -> None:
    assert name not in CASES, name
    CASES[name] = answers, attack, ServerLimits(**limits) if limits else None


# Another client's session.
THEIRS: dict[str, Callable[[Any], Any]] = {
    "Adapter": lambda head: pb.SimpleRequest(header=head),
    "OptimizerState": lambda head: pb.SimpleRequest(header=head),
    "SetAdapter": lambda head: pb.TensorsRequest(header=head),
    "RestoreOptimizer": lambda head: pb.TensorsRequest(header=head),
    "Forward": lambda head: pb.ForwardRequest(header=head, states=states(), step=2),
    "Backward": lambda head: pb.BackwardRequest(header=head, states=states(), step=2),
    "OptimizerStep": lambda head: pb.StepRequest(header=head, scale=1.0),
    "BeginRound": lambda head: pb.BeginRoundRequest(header=head, total_steps=1),
    "Decode": lambda head: pb.DecodeRequest(
        header=head, cache=1, states=states((1, 1), left=True), total_tokens=5, total_lengths=[5, 4]
    ),
    "AppendRows": lambda head: pb.AppendRequest(header=head, cache=1, other=1, rows=[0]),
    "CloseCache": lambda head: pb.CacheRequest(header=head, cache=1),
    "Discard": lambda head: pb.SimpleRequest(header=head),
    "Restore": lambda head: pb.SimpleRequest(header=head),
    "Leave": lambda head: pb.SimpleRequest(header=head),
}
for method, write in THEIRS.items():
    case(
        f"another's session: {method}",
        STRANGE,
        lambda w, method=method, write=write: w.send(method, write(w.victim.header())),
    )
case(
    "another's session: its newest request again, for its reply",
    STRANGE,
    lambda w: w.send("Adapter", pb.SimpleRequest(header=w.victim.header(0))),
)
for shown, guess in {
    "0": lambda w: 0,
    "2^64-1": lambda w: 2**64 - 1,
    "own + 1": lambda w: w.head().session + 1,
}.items():
    case(
        f"guessed session {shown}",
        STRANGE,
        lambda w, guess=guess: w.send("Adapter", pb.SimpleRequest(header=pb.Header(session=guess(w), sequence=1))),
    )
case("no header", STRANGE, lambda w: w.send("OptimizerStep", pb.StepRequest(scale=1.0)))

# Its own count of requests.
case("a gap", LATE, lambda w: w.send("OptimizerStep", pb.StepRequest(header=w.head(2), scale=1.0)))
case("an old number", LATE, lambda w: w.send("OptimizerStep", pb.StepRequest(header=w.head(-1), scale=1.0)))
case("the number 0", LATE, lambda w: w.send("Adapter", pb.SimpleRequest(header=w.head(-w.head(0).sequence))))
case(
    "the largest number",
    LATE,
    lambda w: w.send("Adapter", pb.SimpleRequest(header=pb.Header(session=w.head().session, sequence=2**64 - 1))),
)
case(
    "the newest number with another request",
    LATE,
    lambda w: w.send("OptimizerStep", pb.StepRequest(header=w.head(0), scale=1.0)),
)

# Steps.
case("a step that is kept already", STATE, lambda w: w.forward(states(), step=2))
case("a gradient of a step that never was", STATE, lambda w: w.backward(states(), step=77))
case("a gradient of a step that is done", STATE, lambda w: w.backward(states(), step=1))
case("a gradient of other lengths", WRONG, lambda w: w.backward(states((5, 4))))
case("a gradient of more rows", WRONG, lambda w: w.backward(states((5, 3, 1))))
case("a gradient of more tokens", WRONG, lambda w: w.backward(states((6, 3))))
case("a gradient that is padded on the left", WRONG, lambda w: w.backward(states(left=True)))
case("whole sequences that are padded on the left", WRONG, lambda w: w.forward(states(left=True)))
for factor in (NAN, INF, -1.0, 1.5):
    case(
        f"a clipping factor of {factor}",
        WRONG,
        lambda w, factor=factor: w.send("OptimizerStep", pb.StepRequest(header=w.head(), scale=factor)),
    )
for pull in (NAN, INF, -1.0):
    case(f"a pull of {pull}", WRONG, lambda w, pull=pull: w.round(proximal_mu=pull))
case("a round of no steps", WRONG, lambda w: w.round(total_steps=0))
case("a pull towards nothing", STATE, lambda w: w.round(proximal_mu=1.0))


def anchored(w: World, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> bytes:
    shapes = w.server.tenancies.of(ATTACKER)[0].host.stage.shapes
    anchor = codec.encode_tensors(change({name: torch.ones(shape) for name, shape in shapes.items()}))
    return w.round(proximal_mu=1.0, has_anchor=True, anchor=anchor)


case("an anchor of NaN", WRONG, lambda w: anchored(w, lambda t: t | {w.names[0]: t[w.names[0]] * NAN}))
case("an anchor of infinity", WRONG, lambda w: anchored(w, lambda t: t | {w.names[0]: t[w.names[0]] * INF}))
case("an anchor that lacks a tensor", WRONG, lambda w: anchored(w, lambda t: {n: t[n] for n in w.names[1:]}))
case("an anchor of another shape", WRONG, lambda w: anchored(w, lambda t: t | {w.names[0]: torch.ones(3, 3)}))

# Numbers that would poison.
for value in (NAN, INF, -INF, 1e9):
    case(f"activations with {value}", WRONG, lambda w, value=value: w.forward(spoilt(value)))
    case(f"a gradient with {value}", WRONG, lambda w, value=value: w.backward(spoilt(value)))
case("tokens with NaN", WRONG, lambda w: w.decode(spoilt(NAN, real=(4, 4), left=True)))
for value in (NAN, INF):
    case(
        f"an adapter with {value}",
        WRONG,
        lambda w, value=value: w.tensors("SetAdapter", {w.names[0]: torch.full((2, WIDTH), value)}),
    )
    for kind in ("exp_avg.", "exp_avg_sq.", "step."):
        case(
            f"an optimizer whose {kind} is {value}",
            WRONG,
            lambda w, value=value, kind=kind: w.optimizer(kind, lambda t: t * 0 + value),
        )
case("an optimizer of negative squares", STATE, lambda w: w.optimizer("exp_avg_sq.", lambda t: -t - 1))
case("an optimizer of negative steps", STATE, lambda w: w.optimizer("steps", lambda t: t - 9))
case("an optimizer of too many steps", STATE, lambda w: w.optimizer("steps", lambda t: t + 2**40))
case("an optimizer of other shapes", STATE, lambda w: w.optimizer("exp_avg.", lambda t: t[:1]))
case("an optimizer in bfloat16", STATE, lambda w: w.optimizer("exp_avg.", lambda t: t.bfloat16()))
case("an optimizer of a tensor that is not", STATE, lambda w: w.tensors("RestoreOptimizer", {
    "steps": torch.tensor(1), "exp_avg.x": torch.ones(1), "exp_avg_sq.x": torch.ones(1), "step.x": torch.ones(1)
}))  # fmt: skip
case("an optimizer of nothing", STATE, lambda w: w.tensors("RestoreOptimizer", {}))

# Messages that say one thing and hold another.
case("rows by the billion", WRONG, lambda w: w.forward(states(rows=HUGE)))
case("tokens by the billion", WRONG, lambda w: w.forward(states(tokens=HUGE)))
case("a width of billions", WRONG, lambda w: w.forward(states(width=HUGE)))
case("rows and tokens within limits, with nothing in them", WRONG, lambda w: w.forward(states(rows=512, tokens=4096)))
case("lengths that add up to terabytes", WRONG, lambda w: w.forward(states(lengths=[HUGE, HUGE])))
case("padding that is a bomb", WRONG, lambda w: w.forward(states((300, *[1] * 300))), max_message_bytes=1 << 20)
case("no rows", WRONG, lambda w: w.forward(states(rows=0, lengths=[])))
case("a shared prefix of billions", WRONG, lambda w: w.forward(states(prefix=HUGE)))
case("a shared prefix that was not sent", WRONG, lambda w: w.forward(states(prefix=1)))
case("a shared prefix that makes a bomb of short rows", WRONG, lambda w: w.forward(
    states((1,) * 300, prefix=4000)
), max_message_bytes=1 << 20)  # fmt: skip
case("a shared prefix in new tokens of a cache", WRONG, lambda w: w.decode(states((1, 1), left=True, prefix=0)))
case("a gradient in one row for a pass in two", WRONG, lambda w: w.backward(states(prefix=0)))
case("a row of no tokens", WRONG, lambda w: w.forward(states(lengths=[5, 0])))
case("no row that has all tokens", WRONG, lambda w: w.forward(states(tokens=6)))
case("another width", WRONG, lambda w: w.forward(states(width=WIDTH // 2)))
case("states that end early", WRONG, lambda w: w.forward(states(data=b"\0" * 100)))
case("states that go on", WRONG, lambda w: w.forward(states(data=b"\0" * 4 * 9 * WIDTH)))
case("no states", WRONG, lambda w: w.forward(pb.States()))
case("a form that is not", WRONG, lambda w: w.forward(form(99)))
case("no form", WRONG, lambda w: w.forward(form(0)))
case("another form than was agreed", WRONG, lambda w: w.forward(states(wire=Wire.INT8)))
case("a gradient in another form than was agreed", WRONG, lambda w: w.backward(states(wire=Wire.BFLOAT16)))
case("scales where there are none", WRONG, lambda w: w.forward(states(scales=b"\0" * 32)))
case("a tensor of terabytes", WRONG, lambda w: w.tensors("SetAdapter", named(w.names[0], (2**40, 2**40))))
case("a tensor that overflows to its size", WRONG, lambda w: w.tensors("SetAdapter", named(w.names[0], (2**62, 4))))
case("a moment of terabytes", WRONG, lambda w: w.tensors("RestoreOptimizer", named("exp_avg.x", (2**50,))))
case("a tensor of nine dimensions", WRONG, lambda w: w.tensors("RestoreOptimizer", named("x", (1,) * 9, b"\0" * 4)))
case("a tensor of nothing", WRONG, lambda w: w.tensors("SetAdapter", named(w.names[0], (0, 4))))
case("a type that is not", WRONG, lambda w: w.tensors("SetAdapter", named(w.names[0], (2, WIDTH), b"\0" * 256, 99)))
case("integers by the thousand", WRONG, lambda w: w.tensors(
    "RestoreOptimizer", named("steps", (1000,), b"\0" * 8000, pb.DTYPE_INT64)
))  # fmt: skip
case("a tensor that is not the adapter's", WRONG, lambda w: w.tensors("SetAdapter", {"x" * 100: torch.ones(2)}))
case("a tensor of the client's own blocks", WRONG, lambda w: w.tensors(
    "SetAdapter", {w.names[0].replace(".1.", ".0."): torch.ones(2, WIDTH)}
))  # fmt: skip
case("a tensor twice", WRONG, lambda w: w.tensors(
    "SetAdapter", pb.Tensors(tensors=[*codec.encode_tensors({w.names[0]: torch.ones(2, WIDTH)}).tensors] * 2)
))  # fmt: skip
case("a name that cannot be printed", WRONG, lambda w: w.tensors("RestoreOptimizer", named("a\nb", (1,), b"\0" * 4)))
case("empty tensors by the million", WRONG, lambda w: w.send(
    "SetAdapter", head_of(w) + within(2, within(1, b"") * 1_000_000)
))  # fmt: skip
case("a shape of a million dimensions", WRONG, lambda w: w.send(
    "SetAdapter", head_of(w) + within(2, within(1, within(3, b"\1" * 1_000_000)))
))  # fmt: skip
case("lengths by the million", WRONG, lambda w: w.send(
    "Forward", head_of(w) + within(2, within(6, b"\1" * 1_000_000))
))  # fmt: skip
case("groups in groups", WRONG, lambda w: w.send("Adapter", head_of(w) + number(9, 3) * 5000))
case("a varint without an end", WRONG, lambda w: w.send("Adapter", b"\x08" + b"\xff" * 100))
case("a field that goes on behind the end", WRONG, lambda w: w.send("Adapter", b"\x0a\xff\xff\xff\xff\x0f"))
case("a name that is no text", WRONG, lambda w: w.send("Hello", within(9, b"\xff\xfe")))
case("random bytes", WRONG, lambda w: w.send("SetAdapter", random.Random(1).randbytes(999)))

# Caches.
case("a cache that never was", WRONG, lambda w: w.decode(states((1, 1), left=True), cache=99))
case("rows that the cache has not", WRONG, lambda w: w.decode(states((1,), left=True), rows=[2], total_lengths=[5]))
case("a row by the billion", WRONG, lambda w: w.decode(states((1,), left=True), rows=[HUGE], total_lengths=[5]))
case("rows by the thousand", FULL, lambda w: w.decode(states((1, 1), left=True), rows=[0] * 4000))
case("lengths that do not meet the cache", WRONG, lambda w: w.decode(states((1, 1), left=True), total_lengths=[5, 5]))
case("lengths by the thousand for a cache", WRONG, lambda w: w.decode(
    states((1, 1), left=True), total_lengths=[5] * 9999
))  # fmt: skip
case("tokens by the billion for a cache", WRONG, lambda w: w.decode(states((1, 1), left=True), total_tokens=HUGE))
case("more rows than the cache", WRONG, lambda w: w.decode(states((1, 1, 1), left=True), total_lengths=[5, 4, 4]))
case("padding within a row of the cache", WRONG, lambda w: w.decode(
    states((2, 1), left=True), total_tokens=6, total_lengths=[6, 4]
))  # fmt: skip
case("a mask of too few bits", WRONG, lambda w: w.decode(states((1, 1), left=True), total_lengths=[], sees=b"\xff"))
case("a mask of too many bits", WRONG, lambda w: w.decode(
    states((1, 1), left=True), total_lengths=[], sees=b"\xff" * 3
))  # fmt: skip
case("a mask by which a token sees nothing", WRONG, lambda w: w.decode(
    states((1, 1), left=True), total_lengths=[], sees=b"\x00\x00"
))  # fmt: skip
case("a mask and lengths", WRONG, lambda w: w.decode(states((1, 1), left=True), sees=b"\xff\xc0"))
case("a mask of the billion", WRONG, lambda w: w.decode(
    states((1, 1), left=True), total_lengths=[], total_tokens=HUGE, sees=b"\xff"
))  # fmt: skip
case("rows of a cache for itself", WRONG, lambda w: w.append())
case("rows for a cache that never was", WRONG, lambda w: w.append(cache=99))
case("rows of a cache that never was", WRONG, lambda w: w.append(other=99))
case("to close a cache that never was", STATE, lambda w: w.send(
    "CloseCache", pb.CacheRequest(header=w.head(), cache=2**63)
))  # fmt: skip
case("sequences longer than granted, in a cache", FULL, lambda w: w.decode(
    states((5, 5), left=True), total_tokens=9, total_lengths=[9, 8]
), max_tokens=8)  # fmt: skip
case("more tokens in caches than granted", FULL, lambda w: w.decode(
    states((1,) * 4, left=True), rows=[0] * 4, total_lengths=[5] * 4
), max_cache_tokens=15)  # fmt: skip

# More than is granted.
case("more rows than granted", WRONG, lambda w: w.forward(states((2,) * 5)), max_rows=4)
case("more tokens than granted", WRONG, lambda w: w.forward(states((9,))), max_tokens=8)
case("more passes than granted", FULL, lambda w: w.forward(states()), max_kept=1)
case("more tokens of passes than granted", FULL, lambda w: w.forward(states()), max_kept_tokens=19)
case("more caches than granted", FULL, lambda w: w.send("OpenCache", pb.SimpleRequest(header=w.head())), max_caches=1)
case("more tenancies than granted", FULL, lambda w: w.hello("second"), max_tenancies=1)
case("more memory than granted", FULL, lambda w: w.hello("second"), max_tenancy_bytes=10_000)
case("more memory than granted, for one adapter", FULL, lambda w: w.hello(
    adapter_json='{"rank": 32}'
), max_tenancy_bytes=10_000)  # fmt: skip
case("more memory than granted, for whole blocks", FULL, lambda w: w.hello(
    adapter_json='{"kind": "full"}'
), max_tenancy_bytes=100_000)  # fmt: skip
case("a rank of billions", FULL, lambda w: w.hello(adapter_json='{"rank": 1000000000000000000000000}'))
case("a rank above the width", FULL, lambda w: w.hello(adapter_json='{"rank": 33}'))
case("a message longer than granted", WRONG, lambda w: w.send("Forward", b"\0" * 9000), max_message_bytes=8192)
case("a small request that is large", WRONG, lambda w: w.send(
    "Adapter", pb.SimpleRequest(header=w.head()).SerializeToString() + within(9, b"\0" * 70_000)
))  # fmt: skip
case("a hello of a million forms", WRONG, lambda w: w.send("Hello", within(6, b"\1" * 1_000_000)))

# Hello.
case("another base", WRONG, lambda w: w.hello(base_sha256="0" * 64))
case("a protocol of the future", WRONG, lambda w: w.hello(version=f"{PROTOCOL}1"))
case("no protocol", WRONG, lambda w: w.hello(version=""))
case("a model of more blocks", WRONG, lambda w: w.hello(total_layers=5))
case("a cut that leaves the server nothing", WRONG, lambda w: w.hello(input_layers=2, output_layers=2))
case("a cut that is no cut", WRONG, lambda w: w.hello(input_layers=4, output_layers=0))
case("a cut of billions", WRONG, lambda w: w.hello(input_layers=HUGE, output_layers=HUGE, total_layers=HUGE))
case("a form of the future", WRONG, lambda w: w.hello(wires=[77]))
case("no form at all", WRONG, lambda w: w.hello(wires=[]))
case("forms by the dozen", WRONG, lambda w: w.hello(wires=[pb.WIRE_FLOAT32] * 12))
for text in (
    "",
    "{",
    "[" * 5000,
    '{"rank": 0}',
    '{"rank": NaN}',
    '{"rank": 1, "pickle": "x"}',
    '{"target_modules": []}',
):
    case(f"an adapter of {text[:30]!r}", WRONG, lambda w, text=text: w.hello(adapter_json=text))
for text in ('{"learning_rate": -1}', '{"learning_rate": 1e999}', '{"clip_norm": "NaN"}'):
    case(f"a training of {text!r}", WRONG, lambda w, text=text: w.hello(training_json=text))
case("layers that are not", WRONG, lambda w: w.hello(adapter_json='{"target_modules": ["x_proj"]}'))
case("layers that are the whole model", WRONG, lambda w: w.hello(adapter_json='{"target_modules": [".*"]}'))
for shown, tenant in {
    "nothing": "", "65 letters": "a" * 65, "a null": "a\0b", "a new line": "a\nb", "a direction": "a\u202eb",
    "many bytes": "\U0001f333" * 64,
}.items():  # fmt: skip
    case(f"a tenancy named by {shown}", WRONG, lambda w, tenant=tenant: w.hello(tenant))

# What an operator offers.
for shown, label in {"nothing": "", "a guess": "0" * 32, "many letters": "a" * 10**4}.items():
    case(
        f"taking what is offered under {shown}",
        S.FAILED_PRECONDITION,
        lambda w, label=label: w.send("TakeAdapter", pb.TakeRequest(header=w.head(), label=label)),
    )

# What is for operators.
OPERATORS = (
    "Tenancies", "ReadAdapter", "WriteAdapter", "OfferAdapter", "SaveTenancy", "RestoreTenancy", "DismissTenancy",
    "Metrics",
)  # fmt: skip
for method in OPERATORS:
    case(
        f"an operator's {method}, as its own operator",
        S.PERMISSION_DENIED,
        lambda w, method=method: w.send(method, pb.TenancyRequest(client=VICTIM, tenant=MAIN)),
    )


@pytest.mark.parametrize("name", CASES)
def test_is_refused_and_changes_nothing(start, shared, expected, name) -> None:
    answers, attack, limits = CASES[name]
    if limits is None:
        shared.begin_anew()
    check_withstands(shared if limits is None else start(limits), expected, attack, answers)


@pytest.mark.parametrize("scale", [NAN, INF, -1.0, 1e30])
def test_scales_that_would_poison_are_refused(start, expected, scale) -> None:
    world = start()
    attempt = world.hello("rounded", wires=[pb.WIRE_INT8])
    head = pb.Header(session=attempt.session, sequence=1)
    request = pb.ForwardRequest(header=head, states=scaled(scale))
    check_withstands(world, expected, lambda w: w.send("Forward", request), WRONG)
    request.states.CopyFrom(scaled(1e-45))  # the smallest there is does no harm
    assert world.send("Forward", request)


# -- who is there ------------------------------------------------------------------------------------------------

YEAR = dt.timedelta(days=365)


def certified(
    authority: Pair | None,
    name: str = VICTIM,
    unit: str = "pplr-client",
    *,
    since: dt.timedelta = -YEAR,
    until: dt.timedelta = YEAR,
    usage: Any = ExtendedKeyUsageOID.CLIENT_AUTH,
    names: int = 1,
) -> tuple[bytes, bytes]:
    """Make a key and a certificate by hand; without an authority it is signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    units = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)]
    subject = x509.Name([*units, *[x509.NameAttribute(NameOID.COMMON_NAME, name)] * names])
    now = dt.datetime.now(dt.UTC)
    draft = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + since)
        .not_valid_after(now + until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    )
    signed = draft.sign(authority.key if authority else key, hashes.SHA256())
    form, cipher = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, cipher), signed.public_bytes(serialization.Encoding.PEM)


def as_stranger(world: World, key: bytes | None, certificate: bytes | None) -> bytes:
    """Say hello as whoever shows this certificate."""
    ca = (world.folder / "ca" / "ca.crt").read_bytes()
    with grpc.secure_channel(
        f"localhost:{world.server.port}", grpc.ssl_channel_credentials(ca, key, certificate)
    ) as channel:
        return send(channel, "Hello", pb.HelloRequest(version=PROTOCOL, tenant=MAIN))


STRANGERS: dict[str, tuple[Any, Callable[[Pair], tuple[bytes | None, bytes | None]]]] = {
    "nobody": (S.UNAVAILABLE, lambda ca: (None, None)),
    "of another authority": (S.UNAVAILABLE, lambda ca: certified(new_authority("trees"))),
    "signed by itself, with the victim's name": (S.UNAVAILABLE, lambda ca: certified(None)),
    "expired": (S.UNAVAILABLE, lambda ca: certified(ca, until=dt.timedelta(minutes=-9))),
    "not yet valid": (S.UNAVAILABLE, lambda ca: certified(ca, since=dt.timedelta(minutes=9))),
    "for servers": (
        (S.UNAVAILABLE, S.PERMISSION_DENIED),
        lambda ca: certified(ca, usage=ExtendedKeyUsageOID.SERVER_AUTH),
    ),
    "of no role": (S.PERMISSION_DENIED, lambda ca: certified(ca, unit="pplr-authority")),
    "of a server's role": (S.PERMISSION_DENIED, lambda ca: certified(ca, unit="pplr-server")),
    "of two names": (S.PERMISSION_DENIED, lambda ca: certified(ca, names=2)),
    "named by a path": (S.PERMISSION_DENIED, lambda ca: certified(ca, "../victim")),
    "named by a prefix": (S.PERMISSION_DENIED, lambda ca: certified(ca, "victim/main")),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_a_certificate_that_does_not_count_is_refused(shared, expected, federation, who) -> None:
    answers, make = STRANGERS[who]
    pair = make(read_pair(federation / "ca" / "ca.key", federation / "ca" / "ca.crt"))
    shared.begin_anew()
    check_withstands(shared, expected, lambda w: as_stranger(w, *pair), answers)


def test_the_servers_own_key_is_no_clients(start, expected, federation) -> None:
    own = read_server(federation / "ca")
    check_withstands(
        start(),
        expected,
        lambda w: as_stranger(w, own.key_pem, own.certificate_pem),
        (S.UNAVAILABLE, S.PERMISSION_DENIED),
    )


@pytest.mark.parametrize("method", ["Hello", "Forward", "Adapter", "OptimizerStep"])
def test_an_operator_is_no_client(start, expected, federation, method) -> None:
    """Not even with the number of a client's session."""
    kit = read_kit(federation / "operator")

    def attack(world: World) -> None:
        channel = StageChannel(f"localhost:{world.server.port}", kit, patience_s=0.0)
        with contextlib.closing(channel):
            send(channel._channel, method, pb.SimpleRequest(header=world.victim.header()))

    check_withstands(start(), expected, attack, S.PERMISSION_DENIED)


@pytest.mark.parametrize("when", ["before connecting", "during a session"])
def test_a_revoked_certificate_is_refused(tmp_path, start, expected, federation, when) -> None:
    shutil.copytree(federation / "ca", tmp_path / "ca")
    world = start(ca=tmp_path / "ca")

    def attack(world: World) -> None:
        revoke(tmp_path / "ca", ATTACKER)
        if when == "during a session":
            world.send("Adapter", pb.SimpleRequest(header=world.head()))
        else:
            kit = read_kit(federation / ATTACKER)
            as_stranger(world, kit.key_pem, kit.certificate_pem)

    check_withstands(world, expected, attack, S.PERMISSION_DENIED, own=False)


def test_a_certificate_that_ends_during_a_session_is_refused(start, expected, monkeypatch) -> None:
    """TLS checks it once, the server at every call."""

    class Later(dt.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return dt.datetime.now(tz) + dt.timedelta(days=20)

    world = start()
    monkeypatch.setattr(identity, "datetime", Later)
    check_withstands(
        world,
        expected,
        lambda w: w.send("Adapter", pb.SimpleRequest(header=w.head())),
        S.PERMISSION_DENIED,
        own=False,
    )


def test_without_a_revocation_list_nobody_is_let_in_until_it_is_back(tmp_path, start, expected, federation) -> None:
    shutil.copytree(federation / "ca", tmp_path / "ca")
    revoked = tmp_path / "ca" / "revoked.txt"
    content = revoked.read_bytes()
    world = start(ca=tmp_path / "ca")

    def attack(world: World) -> None:
        revoked.write_bytes(b"")
        try:
            world.send("Adapter", pb.SimpleRequest(header=world.head()))
        finally:
            revoked.write_bytes(content)

    check_withstands(world, expected, attack, S.PERMISSION_DENIED)


def test_no_more_clients_than_granted(start, expected, federation) -> None:
    def attack(world: World) -> None:
        Party(world.server, read_kit(federation / "third"))

    check_withstands(start(ServerLimits(max_clients=2)), expected, attack, TransportError)


# -- sessions ----------------------------------------------------------------------------------------------------


def test_an_old_request_of_the_victim_sent_again_is_refused(start, expected) -> None:
    """As somebody would who could replay its traffic."""
    world = start()
    old = pb.StepRequest(header=world.victim.header(-4), scale=1.0)
    check_withstands(world, expected, lambda w: w.victim.send("OptimizerStep", old), LATE)


def test_the_newest_request_sent_again_gets_the_same_reply_and_steps_once(start, expected) -> None:
    world = start()
    request = pb.StepRequest(header=world.head(), scale=1.0)
    first = world.send("OptimizerStep", request)
    once = remains(world.server, ATTACKER)[1]

    def attack(world: World) -> None:
        assert world.send("OptimizerStep", request) == first

    check_withstands(world, expected, attack, None, own=False)
    check_same(once, remains(world.server, ATTACKER)[1], ATTACKER)


def test_the_same_request_at_once_on_two_connections_is_carried_out_once(start, expected, federation) -> None:
    world = start()
    kit = read_kit(federation / ATTACKER)
    request = pb.StepRequest(header=world.head(), scale=1.0)

    def attack(world: World) -> None:
        with own_channel(world, kit) as other, futures.ThreadPoolExecutor(2) as pool:
            with world.server._turns.of("nobody"):
                both = [pool.submit(send, one, "OptimizerStep", request)
                        for one in (world.attacker.channel._channel, other)]  # fmt: skip
                await_waiting(world.server, 1)
            assert both[0].result() == both[1].result()

    check_withstands(world, expected, attack, None, own=False)
    assert int(remains(world.server, ATTACKER)[1][f"{MAIN}: steps"]) == 2


def test_requests_that_overtake_each_other_are_refused(start, expected) -> None:
    world = start()
    first, second = (pb.SimpleRequest(header=world.head(ahead)) for ahead in (1, 2))

    def attack(world: World) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            world.send("Adapter", second)
        assert refused.value.code() is LATE
        world.send("Adapter", first)
        world.send("Adapter", second)
        world.send("Adapter", first)

    check_withstands(world, expected, attack, LATE, own=False)


def test_hello_sent_again_gives_the_same_session(start, expected) -> None:
    world = start()

    def attack(world: World) -> None:
        sessions = {world.hello("again", attempt=5).session for _ in range(3)}
        assert len(sessions) == 1
        assert world.hello("again", attempt=6).session not in sessions

    check_withstands(world, expected, attack, None, own=False)


def test_an_old_hello_sent_again_does_not_begin_anew(start, expected) -> None:
    world = start()
    granted = world.hello("old", attempt=5)
    world.send("Adapter", pb.SimpleRequest(header=pb.Header(session=granted.session, sequence=1)))
    check_withstands(world, expected, lambda w: w.hello("old", attempt=5), STATE)


def test_an_older_session_of_the_same_tenancy_is_refused(start, expected) -> None:
    world = start()
    older = world.hello("twice").session
    world.hello("twice")
    request = pb.SimpleRequest(header=pb.Header(session=older, sequence=1))
    check_withstands(world, expected, lambda w: w.send("Adapter", request), STRANGE)


def test_a_session_that_is_replaced_while_its_call_waits_is_refused(start, expected) -> None:
    world = start()
    granted = world.hello("waits")
    old = next(own for own in world.server.tenancies.of(ATTACKER) if own.number == granted.session)
    request = pb.StepRequest(header=pb.Header(session=granted.session, sequence=1), scale=1.0)
    newer = []

    def attack(world: World) -> None:
        with futures.ThreadPoolExecutor(1) as pool:
            with world.server._turns.of("nobody"):
                waits = pool.submit(world.send, "OptimizerStep", request)
                await_waiting(world.server, 1)
                newer.append(world.server.tenancies.open(old.owner, old.settings, (Wire.FLOAT32,), 9, keep=False))
            waits.result()

    check_withstands(world, expected, attack, STRANGE, own=False)
    assert int(newer[0].host.optimizer_state(newer[0].name)["steps"]) == 0


@pytest.mark.parametrize("tenant", ["victim", "victim/main", "../victim/main", "main ", "MAIN"])
def test_a_tenancy_named_like_anothers_is_its_own(start, expected, tenant) -> None:
    """The names are below the certificate's, so they meet nobody's."""

    def attack(world: World) -> None:
        granted = world.hello(tenant, keep=True)
        assert not granted.kept
        head = pb.Header(session=granted.session, sequence=1)
        world.send("SetAdapter", pb.TensorsRequest(
            header=head, tensors=codec.encode_tensors({world.names[0]: torch.ones(2, WIDTH)})
        ))  # fmt: skip
        world.send("Leave", pb.SimpleRequest(header=pb.Header(session=granted.session, sequence=2)))

    check_withstands(start(), expected, attack, None)


@pytest.mark.parametrize("tenant", ["../../x", "..", ".", "/etc/x", "~", "a/../../b", "%2e%2e", "c:\\x", "ü" * 40])
def test_nothing_is_written_outside_the_state_folder(tmp_path, start, expected, tenant) -> None:
    world = start(state=tmp_path / "deep" / "state")

    def attack(world: World) -> None:
        granted = world.hello(tenant)
        world.send("Save", pb.SimpleRequest(header=pb.Header(session=granted.session, sequence=1)))
        again = world.hello(tenant, keep=True)
        assert again.kept
        world.send("Restore", pb.SimpleRequest(header=pb.Header(session=again.session, sequence=1)))

    check_withstands(world, expected, attack, None, own=False)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state"]
    (own,) = (tmp_path / "deep" / "state").iterdir()
    (place,) = own.iterdir()
    assert (own.name, place.name[:2]) == ("c-attacker", "t-")
    assert [str(owner) for owner in world.server.tenancies.store.owners()] == [f"attacker/{tenant}"]


def test_a_disk_is_not_filled_by_names(tmp_path, start, expected) -> None:
    world = start(ServerLimits(max_saved=2), state=tmp_path)

    def attack(world: World) -> None:
        for turn in range(9):
            granted = world.hello(f"name {turn}")
            for sequence, method in enumerate(("Save", "Save", "Leave"), 1):
                head = pb.Header(session=granted.session, sequence=sequence)
                world.send(method, pb.SimpleRequest(header=head))

    check_withstands(world, expected, attack, FULL, own=False)
    assert len(world.server.tenancies.store.owners()) == 2


def test_hello_that_cannot_go_on_leaves_the_tenancy(start, expected) -> None:
    """What a training of no sense left cannot be kept, and is not lost by asking for it either."""
    world = start()
    kept = remains(world.server, ATTACKER)
    parameters = world.server.tenancies.of(ATTACKER)[0].host._tenancies[f"{ATTACKER}/{MAIN}"].member.parameters
    first = parameters[world.names[0]]
    before = first.detach().clone()
    with torch.no_grad():
        first.fill_(NAN)
    with pytest.raises(grpc.RpcError) as refused:
        world.hello(keep=True)
    assert refused.value.code() is WRONG
    with torch.no_grad():
        first.copy_(before)
    check_same(kept[1], remains(world.server, ATTACKER)[1], ATTACKER)
    check_same(expected[VICTIM], world.victim.go_on(), VICTIM)


def test_a_gradient_of_a_pass_that_the_adapter_left_behind_is_refused(start, expected) -> None:
    """It frees what was kept of the pass, so that nobody is kept out by it."""
    world = start(ServerLimits(max_kept=1))
    world.attacker.transport.set_adapter({world.names[0]: torch.ones(2, WIDTH)})
    check_withstands(world, expected, lambda w: w.backward(states()), WRONG, own=False)
    assert remains(world.server, ATTACKER)[0][MAIN][5] == {}
    assert world.forward(states())


def test_a_closed_cache_is_not_used_again(start, expected) -> None:
    world = start()
    world.attacker.transport.close_cache(world.attacker.cache)
    check_withstands(world, expected, lambda w: w.decode(states((1, 1), left=True)), WRONG, own=False)
    close = pb.CacheRequest(header=world.head(), cache=world.attacker.cache)
    with pytest.raises(grpc.RpcError) as refused:
        world.send("CloseCache", close)
    assert refused.value.code() is STATE


def test_a_message_of_too_many_parts_is_never_parsed() -> None:
    """Each of its empty tensors would take eighty bytes, so it is refused while it is bytes."""
    seen = []
    spy = SimpleNamespace(DESCRIPTOR=pb.TensorsRequest.DESCRIPTOR, FromString=seen.append)
    for crowd in (within(1, b"") * 200_000, within(1, within(3, b"\1" * 200_000)), within(7, b"") * 200_000):
        with refuses(WireError, "parts"):
            parsed(spy, within(2, crowd))
    assert not seen
    fine = codec.encode_tensors({f"layer {number}": torch.ones(2, 2) for number in range(16_000)})
    request = pb.TensorsRequest(header=pb.Header(session=1, sequence=2), tensors=fine)
    assert parsed(pb.TensorsRequest, request.SerializeToString()) == request


def test_a_cut_outside_of_what_the_server_holds_is_refused(tmp_path, federation) -> None:
    tiny_decoder().save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    write_bundles(tmp_path / "whole", tmp_path / "cut", input_layers=1, output_layers=1)
    config = BackboneConfig(model=str(tmp_path / "cut" / "server"), dtype="float32")
    backbone = load_backbone(config, lambda _: None)
    worlds = []
    for _ in range(2):
        server = StageServer(backbone, read_server(federation / "ca"), "localhost:0")
        server.start()
        worlds.append(World(server, federation, backbone.fingerprint()))
    quiet, world = worlds
    expected = {name: party.go_on() for name, party in quiet.parties.items()}
    for plan in ((0, 0), (0, 1), (1, 0)):
        fields = {"input_layers": plan[0], "output_layers": plan[1]}
        with pytest.raises(grpc.RpcError) as refused:
            world.hello(**fields)
        assert refused.value.code() is WRONG
    check_withstands(world, expected, lambda w: w.hello(input_layers=0, output_layers=0), WRONG)
    for each in worlds:
        each.close()
        each.server.stop(0.0)


def test_forms_that_the_server_does_not_take_are_refused(start, expected) -> None:
    world = start(wires=(Wire.FLOAT32,))
    check_withstands(world, expected, lambda w: w.hello(wires=[pb.WIRE_INT8]), WRONG)


# -- bytes and connections ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_channel(world: World, kit: Kit) -> Iterator[grpc.Channel]:
    """Open a connection that is shared with nobody."""
    credentials = grpc.ssl_channel_credentials(kit.ca_pem, kit.key_pem, kit.certificate_pem)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"localhost:{world.server.port}", credentials, options=options) as channel:
        yield channel


def await_waiting(server: StageServer, calls: int, within_s: float = 5.0) -> None:
    until = time.monotonic() + within_s
    while server._turns.waiting < calls:
        assert time.monotonic() < until, f"{server._turns.waiting} calls wait, expected {calls}"
        time.sleep(0.005)


def stream(world: World, parts: Any, method: str = "Adapter", timeout: float = 10.0) -> list[bytes]:
    return list(world.attacker.channel._channel.stream_stream(f"/{SERVICE}/{method}")(iter(parts), timeout=timeout))


def declared(size: int, content: bytes = b"") -> bytes:
    return struct.pack("<Q", size) + content


STREAMS: dict[str, tuple[Any, list[bytes]]] = {
    "nothing": (WRONG, []),
    "less than a length": (WRONG, [b"\0\0\0"]),
    "a message that ends early": (WRONG, [declared(100, b"x" * 50)]),
    "a message that goes on": (WRONG, [declared(2, b"x" * 50)]),
    "a message that goes on in another frame": (WRONG, [declared(2, b"xx"), b"x"]),
    "a length of exabytes": (WRONG, [declared(2**64 - 1)]),
    "a length just over the limit": (WRONG, [declared(2**16 + 1)]),
    "a frame over gRPC's limit": ((FULL, WRONG, S.CANCELLED), [declared(3 << 20, b"x" * (3 << 20))]),
    "two messages": (WRONG, [*frames(b"\x0a\0"), *frames(b"\x0a\0")]),
}


@pytest.mark.parametrize("sent", STREAMS)
def test_frames_that_are_no_message_are_refused(start, expected, sent) -> None:
    answers, parts = STREAMS[sent]
    check_withstands(start(), expected, lambda w: stream(w, parts), answers)


@pytest.mark.parametrize(
    "method", [f"/{SERVICE}/Eval", "/pplr.Other/Hello", "/", "/grpc.reflection.v1.ServerReflection/X"]
)
def test_a_method_that_is_not_is_refused(start, expected, method) -> None:
    def attack(world: World) -> None:
        list(world.attacker.channel._channel.stream_stream(method)(frames(b""), timeout=5))

    check_withstands(start(), expected, attack, S.UNIMPLEMENTED)


def test_health_is_not_watched(start, expected) -> None:
    def attack(world: World) -> None:
        list(world.attacker.channel._channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=5))

    check_withstands(start(), expected, attack, S.UNIMPLEMENTED)


@pytest.mark.parametrize("drop", [declared(1000, b"x"), b""])
def test_a_slow_sender_is_cut_off(start, expected, drop) -> None:
    """Whether it sends a little at a time, or only empty frames; it would go on for as long as it is let."""
    world = start(ServerLimits(call_timeout_s=1.0))  # enough for an honest call on a machine that is busy
    over = threading.Event()

    def drip() -> Iterator[bytes]:
        yield drop
        while not over.wait(0.02):
            yield drop[-1:]

    def attack(world: World) -> None:
        try:
            stream(world, drip())
        finally:
            over.set()

    check_withstands(world, expected, attack, S.CANCELLED)


def test_a_client_that_hangs_up_in_the_middle_is_forgotten(start, expected) -> None:
    world = start()
    gone = threading.Event()

    def parts() -> Iterator[bytes]:
        yield declared(1000, b"x")
        gone.wait(5)

    def attack(world: World) -> None:
        call = world.attacker.channel._channel.stream_stream(f"/{SERVICE}/Adapter")(parts())
        until = time.monotonic() + 5
        while not world.server._calls[ATTACKER] and time.monotonic() < until:
            time.sleep(0.005)
        assert world.server._calls[ATTACKER] == 1
        call.cancel()
        gone.set()
        while world.server._calls[ATTACKER] and time.monotonic() < until:
            time.sleep(0.005)
        list(call)

    check_withstands(world, expected, attack, S.CANCELLED)
    assert world.server._calls[ATTACKER] == 0


def test_a_client_that_hangs_up_while_its_request_waits_can_send_it_again(start, expected) -> None:
    """The request is carried out once, and its reply waits for the one who asks again."""
    world = start()
    request = pb.StepRequest(header=world.head(), scale=1.0)
    method = world.attacker.channel._channel.stream_stream(f"/{SERVICE}/OptimizerStep")

    def attack(world: World) -> None:
        with world.server._turns.of("nobody"):
            call = method(frames(request.SerializeToString()))
            await_waiting(world.server, 1)
            call.cancel()
        until = time.monotonic() + 5
        while world.server.tenancies.of(ATTACKER)[0].sequence != request.header.sequence:
            assert time.monotonic() < until
            time.sleep(0.005)
        world.send("OptimizerStep", request)

    check_withstands(world, expected, attack, None, own=False)
    assert int(remains(world.server, ATTACKER)[1][f"{MAIN}: steps"]) == 2


def test_plain_text_is_refused(start, expected) -> None:
    def attack(world: World) -> None:
        with grpc.insecure_channel(f"localhost:{world.server.port}") as channel:
            send(channel, "Hello", b"", timeout=5)

    check_withstands(start(), expected, attack, S.UNAVAILABLE)


def closed(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    told = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := connection.recv(1 << 16):
            told += part
    return told


def tls(world: World, *, kit: Kit | None, protocols: tuple[str, ...]) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(world.folder / "ca" / "ca.crt"))
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    if kit is not None:
        folder = world.folder / kit.name
        context.load_cert_chain(folder / "client.crt", folder / "client.key")
    if protocols:
        context.set_alpn_protocols(list(protocols))
    plain = socket.create_connection(("localhost", world.server.port), timeout=5)
    return context.wrap_socket(plain, server_hostname="localhost")


@pytest.mark.parametrize(
    "content", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 999]
)
def test_a_web_browser_and_a_broken_handshake_are_hung_up_on(start, expected, content) -> None:
    def attack(world: World) -> None:
        with socket.create_connection(("localhost", world.server.port), timeout=5) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            assert b"HTTP/1.1 200" not in closed(connection)

    check_withstands(start(), expected, attack, None)


@pytest.mark.parametrize("protocols", [(), ("http/1.1",), ("h2",)])
def test_what_is_no_http2_after_the_handshake_is_hung_up_on(start, expected, protocols) -> None:
    kit = SimpleNamespace(name=ATTACKER)

    def attack(world: World) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError), tls(world, kit=kit, protocols=protocols) as connection:
            connection.sendall(random.Random(2).randbytes(4096))
            assert b"pplr" not in closed(connection)

    check_withstands(start(), expected, attack, None)


def test_many_connections_that_say_nothing_keep_nobody_out(start, expected) -> None:
    with contextlib.ExitStack() as stack:

        def attack(world: World) -> None:
            for turn in range(150):
                connection = stack.enter_context(socket.create_connection(("localhost", world.server.port), timeout=5))
                if turn % 2:
                    connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake

        check_withstands(start(), expected, attack, None)


def test_more_calls_at_once_than_granted_are_refused_and_keep_nobody_out(start, expected, federation) -> None:
    world = start(ServerLimits(concurrent_calls=2, workers=4, max_clients=3))
    kit, gone = read_kit(federation / ATTACKER), threading.Event()

    def parts() -> Iterator[bytes]:
        yield declared(1000, b"x")
        gone.wait(20)

    def attack(world: World) -> None:
        with contextlib.ExitStack() as stack:
            calls = []
            for _ in range(4):
                channel = stack.enter_context(own_channel(world, kit))
                stack.callback(gone.set)
                method = channel.stream_stream(f"/{SERVICE}/Adapter")
                calls += [method(parts(), timeout=20) for _ in range(8)]
            until = time.monotonic() + 5
            while not (full := [call for call in calls if call.done() and call.code() is FULL]):
                assert time.monotonic() < until
                time.sleep(0.01)
            assert {call.code() for call in calls if call.done()} <= {FULL, S.UNAVAILABLE}  # either may be tried again
            world.victim.send("GradientNorm", pb.NormRequest(header=world.victim.header()))  # beside the flood
            world.victim.transport._sequence += 1
            before.update(remains(world.server, VICTIM)[1])
            raise full[0]

    before: dict[str, torch.Tensor] = {}
    with pytest.raises(grpc.RpcError) as refused:
        attack(world)
    assert refused.value.code() is FULL
    until = time.monotonic() + 5
    while world.server._calls[ATTACKER] and time.monotonic() < until:
        time.sleep(0.005)
    check_same(before, remains(world.server, VICTIM)[1], VICTIM)
    for name, party in world.parties.items():
        check_same(expected[name], party.go_on(), name)


def test_what_grpc_refuses_for_a_crowd_is_tried_again(start) -> None:
    """A flood of others is no reason for a run to end; what the server itself refuses is final."""
    world = start()
    crowded, refused = (
        SimpleNamespace(code=lambda: FULL, trailing_metadata=lambda told=told: told)
        for told in ((), ((framing.REFUSED, "1"),))
    )
    from pplr.runtimes.stage_channel import _is_crowded

    assert _is_crowded(crowded)
    assert not _is_crowded(refused)
    with pytest.raises(grpc.RpcError) as told:
        world.hello(adapter_json='{"rank": 33}')
    assert told.value.code() is FULL
    assert not _is_crowded(told.value)


def flooded(world: World, kit: Kit) -> list[str]:
    """Queue calls of the attacker, then one of the victim, and list in which order they were carried out."""
    order: list[str] = []
    inner = world.server.tenancies.count
    world.server.tenancies.count = lambda session, *rest: (order.append(session.owner.client), inner(session, *rest))
    heads = [pb.Header(session=world.hello(f"flood {turn}").session, sequence=1) for turn in range(6)]
    with own_channel(world, kit) as channel, futures.ThreadPoolExecutor(8) as pool:
        method = channel.stream_stream(f"/{SERVICE}/Adapter")
        with world.server._turns.of("nobody"):
            floods = []
            for turn, head in enumerate(heads):
                floods.append(pool.submit(list, method(frames(pb.SimpleRequest(header=head).SerializeToString()))))
                await_waiting(world.server, turn + 1)
            victim = pool.submit(world.victim.transport.gradient_norm_squared)
            await_waiting(world.server, len(heads) + 1)
        victim.result()
        for flood in floods:
            flood.result()
    return order


def check_rotation(world: World, kit: Kit) -> None:
    order = flooded(world, kit)
    assert len(order) == 7
    assert order.index(VICTIM) <= 1, order


def test_a_flood_of_one_client_is_served_in_rotation(start, expected, federation) -> None:
    world = start()
    check_rotation(world, read_kit(federation / ATTACKER))
    check_same(expected[VICTIM], world.victim.go_on(), VICTIM)


def test_the_check_of_rotation_sees_a_queue(start, federation, monkeypatch) -> None:
    class Queue(Turns):
        def of(self, client: str) -> Any:
            return super().of("everyone")

    monkeypatch.setattr(stage_server, "Turns", Queue)
    with pytest.raises(AssertionError):
        check_rotation(start(), read_kit(federation / ATTACKER))


def test_replies_that_are_kept_for_retries_do_not_fill_the_memory(start, expected) -> None:
    world = start(ServerLimits(max_message_bytes=40_000))
    size = len(world.send("Adapter", pb.SimpleRequest(header=world.head())))
    world.attacker.transport._sequence += 1
    most = 40_000 // size

    def attack(world: World) -> None:
        for turn in range(most + 3):
            granted = world.hello(f"keeps {turn}")
            world.send("Adapter", pb.SimpleRequest(header=pb.Header(session=granted.session, sequence=1)))

    check_withstands(world, expected, attack, None, own=False)
    kept = [len(own.reply or b"") for own in world.server.tenancies.of(ATTACKER)]
    assert 40_000 - size < sum(kept) <= 40_000
    assert world.server.tenancies.of(ATTACKER)[-1].reply


def test_an_error_of_the_server_tells_nothing_of_itself(start, expected, monkeypatch) -> None:
    def broken(self: Any, message: Any) -> Any:
        raise OSError("/secret/place")

    world = start()
    monkeypatch.setattr(Tenancies, "session", broken)
    with pytest.raises(grpc.RpcError) as told:
        world.send("Adapter", pb.SimpleRequest(header=world.head()))
    assert told.value.code() is S.INTERNAL
    assert "secret" not in told.value.details()
    monkeypatch.undo()
    check_same(expected[VICTIM], world.victim.go_on(), VICTIM)


def test_the_clients_own_mistake_is_not_counted(start, expected) -> None:
    """What cannot be written is refused on this side, and the next request is still the next."""
    world = start()

    def attack(world: World) -> None:
        world.attacker.transport.set_adapter({world.names[0]: torch.ones(2, WIDTH, dtype=torch.float64)})

    check_withstands(world, expected, attack, WireError)


def test_a_client_whose_session_was_taken_over_is_told(start, expected) -> None:
    world = start()
    world.hello()
    check_withstands(world, expected, lambda w: w.attacker.transport.adapter(), ServerLostError, own=False)


# -- the check sees what it is for -------------------------------------------------------------------------------


def works(world: World) -> None:
    """Do what a client may: train, generate, write, let go."""
    own = world.attacker.transport
    world.attacker.go_on()
    own.set_adapter({name: torch.ones_like(tensor) for name, tensor in own.adapter().items()})
    cache = own.open_cache()
    own.decode(torch.ones(2, 3, WIDTH), StageCall(attention_mask=torch.ones(2, 3, dtype=torch.long)), cache)
    own.discard()


def takes_over(world: World) -> None:
    own = world.server.tenancies.of(ATTACKER)[0]
    world.send("OptimizerStep", pb.StepRequest(header=world.victim.header(), scale=1.0))
    assert own.sequence


def share_tenancies(world: World, patch: pytest.MonkeyPatch) -> None:
    tenancies = world.server.tenancies.all()[0].host._tenancies
    patch.setitem(tenancies, f"{ATTACKER}/{MAIN}", tenancies[f"{VICTIM}/{MAIN}"])


def share_caches(world: World, patch: pytest.MonkeyPatch) -> None:
    tenancies = world.server.tenancies.all()[0].host._tenancies
    theirs = tenancies[f"{VICTIM}/{MAIN}"].caches[world.victim.cache]
    patch.setitem(tenancies[f"{ATTACKER}/{MAIN}"].caches, world.attacker.cache, theirs)


def forget_to_bind(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AdapterSlots, "bind", lambda self, parameters: None)


def any_session(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Tenancies, "session", lambda self, client, number: next(own for own in self.all() if own.number == number)
    )


class Lax:
    """A count that any number meets."""

    def __add__(self, other: int) -> Lax:
        return self

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def no_count(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Session, "sequence", property(lambda self: Lax(), lambda self, value: None), raising=False)
    patch.setattr(Tenancies, "count", lambda self, session, asked, reply: None)


def no_finite_check(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(codec, "_check_norms", lambda vectors, most, what: None)
    patch.setattr("pplr.stages.stage.check_adapter", lambda *_, **__: None)


def no_roles(world: World, patch: pytest.MonkeyPatch) -> None:
    told = stage_server.identity_of

    def everything(pem: bytes, **options: Any) -> Any:
        seen = told(pem, **options)
        return SimpleNamespace(name=seen.name, serial=seen.serial, role=_Any(seen.role))

    patch.setattr(stage_server, "identity_of", everything)


class _Any(str):
    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def replayed(world: World) -> None:
    world.victim.send("OptimizerStep", pb.StepRequest(header=world.victim.header(-4), scale=1.0))


BROKEN: dict[str, tuple[Any, Callable[[World], Any], Any, str]] = {
    "one tenancy for all": (share_tenancies, works, None, "victim has .*entering 2.* more or less"),
    "one cache for all": (share_caches, works, None, "victim: main: keys .* changed"),
    "an adapter that stays bound": (forget_to_bind, works, None, "victim: decoded changed"),
    "sessions without their owner": (any_session, takes_over, STRANGE, "victim: main: steps changed"),
    "no count of requests": (no_count, replayed, LATE, "victim: main: steps changed"),
    "no check of numbers": (no_finite_check, CASES["an adapter with nan"][1], WRONG, "attacker: main: .* changed"),
    "no roles": (
        no_roles,
        lambda w: w.send("DismissTenancy", pb.TenancyRequest(client=VICTIM, tenant=MAIN)),
        S.PERMISSION_DENIED,
        "victim has .* more or less",
    ),
}


def test_what_a_client_may_do_changes_nothing_for_others(start, expected) -> None:
    check_withstands(start(), expected, works, None, own=False)


@pytest.mark.parametrize("how", BROKEN)
def test_the_check_sees_a_server_that_is_broken(start, expected, monkeypatch, how) -> None:
    """The same attack and the same check, which passes, fails on a server whose guard was taken out."""
    take_out, attack, answer, seen = BROKEN[how]
    own = how == "no check of numbers"
    world = start()
    with monkeypatch.context() as patch:
        take_out(world, patch)
        with pytest.raises(AssertionError, match=seen):
            check_withstands(world, expected, attack, (answer, None), own=own)
    check_withstands(start(), expected, attack, answer, own=own)


def test_altered_requests_are_answered_or_refused() -> None:
    """A short run of what ``fuzz_codec.py`` does for as long as it is asked to."""
    seen = runpy.run_path(str(Path(__file__).with_name("fuzz_codec.py")))["fuzz"](1500, seed=0)
    assert sum(seen.values()) == 1500
    assert seen["answered"] > 50, seen
    assert seen["WireError"] > 50, seen
