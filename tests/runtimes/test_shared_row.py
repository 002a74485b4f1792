"""Samples in one row across the network: the same as in one process, in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pplr.backbones.shared_row import SharedRow
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError, WireError
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.codec import Limits, Wire, decode_states, encode_states, row_of
from pplr.runtimes.identity import enroll_client, init_federation, read_kit, read_server
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_client import GrpcTransport
from pplr.runtimes.stage_server import ServerLimits, StageServer
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.testing import random_adapter, refuses, same_state, tiny_backbone, tiny_catalog, tiny_samples

PLAN, ADAPTER = CutPlan(1, 1, 4), AdapterConfig(rank=2, dropout=0.2)
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=1, shared_prefix=True)
ROW = SharedRow(4, (3, 1, 2))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    init_federation(folder / "ca", "trees", ["localhost"], address="localhost:1")
    enroll_client(folder / "ca", "one", folder / "one")
    return folder


@pytest.fixture
def serve(federation: Path, request: pytest.FixtureRequest) -> Any:
    def start(backbone: Any = None, **limits: Any) -> StageServer:
        own = StageServer(
            backbone or tiny_backbone(), read_server(federation / "ca"), "localhost:0", ServerLimits(**limits)
        )
        own.start()
        request.addfinalizer(lambda: own.stop(0.0))
        return own

    return start


def connect(server: StageServer, kit: Path, backbone: Any, wire: Wire = Wire.FLOAT32) -> GrpcTransport:
    channel = StageChannel(f"localhost:{server.port}", read_kit(kit), timeout_s=30.0, patience_s=0.0)
    return GrpcTransport(channel, "main", PLAN, base_sha256=backbone.fingerprint(), width=32, adapter=ADAPTER,
                         training=TRAINING, wires=[wire])  # fmt: skip


def client(server: StageServer | None, kit: Path, in_flight: int = 1) -> ClientModel:
    backbone = tiny_backbone()
    made = None if server is None else lambda *_: connect(server, kit, backbone)
    cut = CutModel(backbone, PLAN, ADAPTER, TRAINING, connect=made, in_flight=in_flight)
    return cut.client("one", random_adapter(cut.shapes, seed=3, scale=0.1))


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_row_across_the_network_is_the_row_in_one_process(federation, serve, in_flight) -> None:
    models = [client(None, federation), client(serve(), federation / "one", in_flight)]
    losses: list[Any] = []
    for model in models:
        samples = model.backbone.encode(tiny_samples(), tiny_catalog(), 3)
        parts = [model.backbone.collate_row(samples[:3]), model.backbone.collate_row(samples[3:])]
        assert all(part.row.prefix > 100 for part in parts)
        model.begin_round(5)
        losses.append([])
        for step in range(2):
            losses[-1] += model.train_batch(parts, [step, 7 + step])
            losses[-1].append(model.optimizer_step(0.5))
        losses[-1].append(float(model.evaluation_loss(parts[0])))
    assert losses[0] == losses[1]
    assert same_state(models[0].adapter(), models[1].adapter())
    assert models[0].traffic == models[1].traffic
    own = models[1].traffic
    unpadded = 2 * 2 * sum(len(s.prompt + s.answer) for s in samples) * 32 * 4
    assert own.bytes_up < 0.55 * unpadded


def test_the_servers_limits_are_of_the_sequences_apart(federation, serve) -> None:
    states, lengths = torch.randn(1, ROW.tokens, 32), torch.tensor([ROW.tokens])
    call = StageCall(lengths=lengths, row=ROW)
    fits = {"max_tokens": 7, "max_rows": 3, "max_kept_tokens": 21}
    for name, most in fits.items():
        own = connect(serve(**(fits | {name: most - 1})), federation / "one", tiny_backbone())
        own.begin_round(5, *_nothing())
        with refuses(TransportError):
            own.forward(states, lengths, call, keep_as=1)
    own = connect(serve(**fits), federation / "one", tiny_backbone())
    own.begin_round(5, *_nothing())
    assert own.forward(states, lengths, call, keep_as=1).shape == states.shape
    own._kept.clear()
    with refuses(TransportError):  # as a batch of one long sequence
        own.backward(1, states, lengths)
    own._kept[1] = StageCall(row=SharedRow(4, (3, 2, 1)))
    with refuses(TransportError, "lengths are not those of step 1"):
        own.backward(1, states, lengths)
    own._kept[1] = StageCall(row=ROW)
    assert own.backward(1, states, lengths).shape == states.shape


def _nothing() -> tuple[Any, None]:
    from pplr.stages.optimizer import LocalObjective

    return LocalObjective(), None


def test_a_model_that_cannot_keep_rows_apart_refuses(federation, serve) -> None:
    yarn = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    backbone = tiny_backbone("llama", rope_parameters=yarn)
    own = connect(serve(backbone), federation / "one", backbone)
    with refuses(TransportError, "do not keep apart"):
        own.forward(torch.randn(1, ROW.tokens, 32), torch.tensor([ROW.tokens]), StageCall(row=ROW), keep_as=None)


def test_a_cache_takes_no_row(federation, serve) -> None:
    own = connect(serve(), federation / "one", tiny_backbone())
    cache = own.open_cache()
    states = encode_states(torch.randn(1, ROW.tokens, 32), torch.tensor([ROW.tokens]), Wire.FLOAT32, row=ROW)
    request = pb.DecodeRequest(
        header=own._header(), cache=cache, states=states, total_tokens=3, total_lengths=[3, 1, 2]
    )
    with refuses(TransportError, "in one row"):
        own._exchange("Decode", request, pb.StatesReply)


def sent(wire: Wire = Wire.FLOAT32, row: SharedRow = ROW) -> pb.States:
    states = torch.randn(1, row.tokens, 4, generator=torch.Generator().manual_seed(0))
    return encode_states(states, torch.tensor([row.tokens]), wire, row=row)


@pytest.mark.parametrize("row", [ROW, SharedRow(0, (3, 1)), SharedRow(0, (1,)), SharedRow(5, (1,))], ids=str)
@pytest.mark.parametrize("wire", Wire)
def test_a_row_comes_as_it_was_sent(wire: Wire, row: SharedRow) -> None:
    message = pb.States.FromString(sent(wire, row).SerializeToString())
    states, lengths = decode_states(message, Limits(4), dtype=torch.float32, device="cpu")
    assert (states.shape, lengths.tolist(), row_of(message)) == ((1, row.tokens, 4), [row.tokens], row)
    given = torch.randn(1, row.tokens, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(states, given) if wire is Wire.FLOAT32 else torch.allclose(states, given, atol=0.05)
    assert row_of(encode_states(given, lengths, wire)) is None


CHANGES: dict[str, Any] = {
    "no prefix": lambda m: m.ClearField("prefix"),
    "a prefix of nothing": lambda m: setattr(m, "prefix", 0),
    "a shorter prefix": lambda m: setattr(m, "prefix", 3),
    "a longer prefix": lambda m: setattr(m, "prefix", 5),
    "a prefix of billions": lambda m: setattr(m, "prefix", 2**32 - 1),
    "no rows": lambda m: setattr(m, "rows", 0),
    "more rows": lambda m: setattr(m, "rows", 4),
    "no tokens": lambda m: setattr(m, "tokens", 0),
    "more tokens": lambda m: setattr(m, "tokens", 4),
    "fewer tokens": lambda m: setattr(m, "tokens", 2),
    "an empty sequence": lambda m: m.lengths.__setitem__(1, 0),
    "a longer sequence": lambda m: m.lengths.__setitem__(1, 2**32 - 1),
    "one sequence more": lambda m: m.lengths.append(1),
    "no sequences": lambda m: m.ClearField("lengths"),
    "less data": lambda m: setattr(m, "data", m.data[:-16]),
    "padding": lambda m: setattr(m, "padded_left", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_altered_field_is_refused(change: Any) -> None:
    message = sent()
    change(message)
    with refuses(WireError):
        decode_states(message, Limits(4), dtype=torch.float32, device="cpu")


def test_limits_hold_at_their_edge() -> None:
    fits = {"max_rows": 3, "max_tokens": 7, "max_message_bytes": max(4 * 3 * 7, 16 * ROW.tokens)}
    decode_states(sent(), Limits(4, **fits), dtype=torch.float32, device="cpu")
    for name, most in fits.items():
        with refuses(WireError):
            decode_states(sent(), Limits(4, **(fits | {name: most - 1})), dtype=torch.float32, device="cpu")


def test_a_long_prefix_of_many_rows_is_refused_before_it_is_spread() -> None:
    message = pb.States(rows=512, tokens=1, width=64, wire=pb.WIRE_FLOAT32, lengths=[1] * 512, prefix=8000)
    message.data = bytes(8512 * 64 * 4)
    with refuses(WireError, "with padding"):
        decode_states(message, Limits(64), dtype=torch.float32, device="cpu")


def test_what_is_no_such_row_is_not_sent() -> None:
    for row in (SharedRow(3, (3, 1, 2)), SharedRow(4, (6, 0))):
        with refuses(WireError):
            encode_states(torch.randn(1, ROW.tokens, 4), torch.tensor([ROW.tokens]), Wire.FLOAT32, row=row)


def test_an_answer_that_stands_otherwise_is_refused(federation, serve, monkeypatch) -> None:
    own = connect(serve(), federation / "one", tiny_backbone())
    real = own._exchange

    def other(name: str, request: Any, kind: Any) -> Any:
        reply = real(name, request, kind)
        reply.states.prefix, reply.states.lengths[0], reply.states.tokens = 3, 4, 4
        return reply

    monkeypatch.setattr(own, "_exchange", other)
    with refuses(WireError, "do not stand as those"):
        own.forward(torch.randn(1, ROW.tokens, 32), torch.tensor([ROW.tokens]), StageCall(row=ROW), keep_as=None)


def test_a_run_in_rows_ends_as_one_of_padded_rows(finished) -> None:
    calm = ("adapter.dropout=0", "adapter.target_modules=[q_proj,v_proj]", "federation.rounds=1")
    padded, rows = finished(*calm), finished(*calm, "training.shared_prefix=true")
    crossed = []
    for run in (padded, rows):
        (record,) = run.rounds
        crossed.append([own["bytes_up"] for own in record["clients"].values()])
    for name, own in padded.rounds[0]["clients"].items():
        assert rows.rounds[0]["clients"][name]["loss"] == pytest.approx(own["loss"], rel=1e-4)
    assert all(one < other for one, other in zip(crossed[1], crossed[0], strict=True))
