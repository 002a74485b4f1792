"""The cut over a real socket with mutual TLS: as exact as in one process, and closed to whoever does not belong."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import ServerLostError, TransportError, WireError
from pplr.recommend.generation import generate
from pplr.recommend.title_search import walk_titles
from pplr.recommend.trie import TitleTrie
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.framing import SERVICE, frames, joined
from pplr.runtimes.identity import enroll_client, init_federation, read_kit, read_server, revoke
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_client import GrpcTransport
from pplr.runtimes.stage_server import ServerLimits, StageServer
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.stages.optimizer import LocalObjective
from pplr.stages.stage import StageCall
from pplr.testing import TransportContract, random_adapter, refuses, same_state, tiny_backbone

PLAN = CutPlan(1, 1, 4)
ADAPTER = AdapterConfig(rank=2, dropout=0.2)
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=1)


def take_two_steps(model: ClientModel) -> None:
    model.begin_round(2)
    for step in range(2):
        batch = model.backbone.pad([list(range(20)), list(range(30, 40))], [12, 5])
        (model.train_loss(batch, step) / batch.targets).backward()
        model.optimizer_step(0.5)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    init_federation(folder / "ca", "trees", ["localhost", "127.0.0.1"], address="localhost:1")
    for name in ("one", "two", "three"):
        enroll_client(folder / "ca", name, folder / name)
    return folder


@pytest.fixture
def serve(federation: Path):
    with contextlib.ExitStack() as stack:

        def start(
            backbone: Any = None, limits: ServerLimits | None = None, folder: Path | None = None, **options: Any
        ) -> StageServer:
            identity = read_server(folder or federation / "ca")
            server = StageServer(backbone or tiny_backbone(), identity, "localhost:0", limits, **options)
            server.start()
            stack.callback(server.stop, 0.0)
            return server

        yield start


def connect(server: StageServer, kit: Path, plan: CutPlan = PLAN, **options: Any) -> GrpcTransport:
    backbone = tiny_backbone()
    settings: dict[str, Any] = {
        "base_sha256": backbone.fingerprint(),
        "width": backbone.hidden_size,
        "adapter": ADAPTER,
        "training": TRAINING,
    }
    patience = options.pop("patience_s", 0.0)
    channel = StageChannel(f"localhost:{server.port}", read_kit(kit), timeout_s=20.0, patience_s=patience)
    return GrpcTransport(channel, options.pop("tenant", "main"), plan, **(settings | options))


class TestGrpcTransport(TransportContract):
    """What holds in one process holds over the network, bit for bit in float32."""

    @pytest.fixture(autouse=True)
    def _network(self, federation: Path, serve: Any) -> None:
        self.federation, self.serve = federation, serve
        self.servers: dict[int, StageServer] = {}

    def connect(self, host, client):
        server = self.servers.setdefault(id(host), self.serve())
        transport = connect(server, self.federation / client)
        transport.set_adapter(host.adapter(client))
        return transport


def raw(server: StageServer, kit: Path, method: str, request: Any) -> bytes:
    """Call without any of the client's care."""
    own = read_kit(kit)
    credentials = grpc.ssl_channel_credentials(own.ca_pem, own.key_pem, own.certificate_pem)
    with grpc.secure_channel(f"localhost:{server.port}", credentials) as channel:
        content = request if isinstance(request, bytes) else request.SerializeToString()
        return joined(channel.stream_stream(f"/{SERVICE}/{method}")(frames(content), timeout=20), 2**24)


def drawn(rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(rows + tokens))


def test_clients_of_different_cuts_share_one_base(federation, serve) -> None:
    backbone = tiny_backbone()
    server = serve(backbone)
    for name, plan in (("one", CutPlan(1, 1, 4)), ("two", CutPlan(0, 0, 4)), ("three", CutPlan(2, 1, 4))):
        local = CutModel(backbone, plan, ADAPTER, TRAINING)
        remote = CutModel(
            backbone,
            plan,
            ADAPTER,
            TRAINING,
            connect=lambda _, plan, name=name: connect(server, federation / name, plan),
        )
        start = random_adapter(local.shapes, seed=3)
        assert remote.shapes == local.shapes
        ended = []
        for cut in (local, remote):
            model = cut.client("a", start)
            take_two_steps(model)
            ended.append(model.adapter())
        assert all(torch.equal(ended[0][tensor], ended[1][tensor]) for tensor in start)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_server_that_runs_blocks_again_changes_no_bit(federation, serve, kind) -> None:
    backbone, adapter, ended = tiny_backbone(), AdapterConfig(kind=kind, rank=2, dropout=0.2), []
    for recompute in (False, True):
        server = serve(backbone, recompute=recompute)
        cut = CutModel(
            backbone, PLAN, adapter, TRAINING,
            connect=lambda _, plan: connect(server, federation / "one", plan, adapter=adapter),  # noqa: B023
        )  # fmt: skip
        model = cut.client("a", random_adapter(cut.shapes, seed=3, scale=0.1 if kind == "lora" else 0.01))
        take_two_steps(model)
        ended.append(model.adapter())
        (session,) = server.tenancies.all()
        assert session.host.stage.recompute == (recompute and kind == "lora")
    assert same_state(*ended)


def test_a_gradient_that_nobody_uses_stays_on_the_server(federation, serve) -> None:
    server = serve()
    transport = connect(server, federation / "one")
    shapes = {name: tuple(tensor.shape) for name, tensor in transport.adapter().items()}
    transport.set_adapter(random_adapter(shapes, scale=0.1))
    transport.begin_round(5, LocalObjective(), None)
    states, lengths = drawn(2, 3), torch.tensor([3, 2])
    norms, replies = [], []
    for step, wanted in ((1, True), (2, False)):
        before = transport.traffic.reading()
        sent = server.metrics.text()
        transport.forward(states, lengths, StageCall(gradient_wanted=wanted), keep_as=step)
        back = transport.backward(step, states, lengths)
        norms.append(transport.gradient_norm_squared())
        crossed = transport.traffic.since(before)
        replies.append(_sent(server.metrics.text()) - _sent(sent))
        transport.optimizer_step(0.0)
        assert crossed.bytes_up == 2 * 5 * 32 * 4
        assert crossed.bytes_down == (2 if wanted else 1) * 5 * 32 * 4
        assert (back is None) == (not wanted)
    assert norms[0] == norms[1] > 0
    assert replies[0] - replies[1] >= 5 * 32 * 4


def _sent(text: str) -> float:
    """Read from the metrics how many bytes the server has sent."""
    lines = [line for line in text.splitlines() if line.startswith("pplr_stage_bytes_total{") and '"sent"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.mark.parametrize("wanted", [True, False])
def test_an_answer_that_is_not_what_was_asked_for_is_refused(federation, serve, monkeypatch, wanted) -> None:
    transport = connect(serve(), federation / "one")
    transport.begin_round(5, LocalObjective(), None)
    states, lengths = drawn(2, 3), torch.tensor([3, 2])
    transport.forward(states, lengths, StageCall(gradient_wanted=wanted), keep_as=1)
    wrong = pb.StatesReply() if wanted else pb.StatesReply(states=codec.encode_states(states, lengths, transport.wire))
    monkeypatch.setattr(transport, "_exchange", lambda *_: wrong)
    with refuses(WireError, "" if wanted else "was not asked for"):
        transport.backward(1, states, lengths)


def test_a_request_that_is_sent_again_gets_the_same_reply_and_nothing_happens_twice(federation, serve) -> None:
    server = serve()
    transport = connect(server, federation / "one")
    transport.set_adapter({name: torch.ones_like(tensor) for name, tensor in transport.adapter().items()})
    transport.begin_round(5, LocalObjective(), None)
    states, lengths = drawn(2, 3), torch.tensor([3, 2])
    transport.forward(states, lengths, StageCall(), keep_as=1)
    transport.backward(1, states, lengths)
    request = pb.StepRequest(header=transport._header(), scale=1.0)
    first = raw(server, federation / "one", "OptimizerStep", request)
    assert raw(server, federation / "one", "OptimizerStep", request) == first
    assert int(transport.optimizer_state()["steps"]) == 1


@pytest.mark.parametrize("ahead", [-1, 2, 100])
def test_a_request_out_of_order_is_refused_and_changes_nothing(federation, serve, ahead) -> None:
    server = serve()
    transport = connect(server, federation / "one")
    before = transport.adapter()
    for _ in range(3):
        transport.adapter()
    header = pb.Header(session=transport._session, sequence=transport._sequence + ahead)
    with pytest.raises(grpc.RpcError) as refused:
        raw(server, federation / "one", "OptimizerStep", pb.StepRequest(header=header, scale=1.0))
    assert refused.value.code() is grpc.StatusCode.OUT_OF_RANGE
    after = transport.adapter()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert int(transport.optimizer_state()["steps"]) == 0


def test_another_clients_session_is_refused(federation, serve) -> None:
    server = serve()
    one, two = connect(server, federation / "one"), connect(server, federation / "two")
    request = pb.SimpleRequest(header=pb.Header(session=one._session, sequence=one._sequence + 1))
    assert raw(server, federation / "one", "Adapter", request)  # its owner may
    request = pb.SimpleRequest(header=pb.Header(session=one._session, sequence=one._sequence + 2))
    with pytest.raises(grpc.RpcError) as refused:
        raw(server, federation / "two", "Adapter", request)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert two.adapter()


def test_a_revoked_client_is_refused_at_its_next_call(tmp_path, federation, serve) -> None:
    shutil.copytree(federation / "ca", tmp_path / "ca")
    server = serve(folder=tmp_path / "ca")
    one, two = connect(server, federation / "one"), connect(server, federation / "two")
    assert one.adapter()
    revoke(tmp_path / "ca", "one")
    with refuses(TransportError, "revoked"):
        one.adapter()
    assert two.adapter()


def test_a_stranger_and_plain_text_do_not_get_in(tmp_path, federation, serve) -> None:
    server = serve()
    init_federation(tmp_path / "other", "others", ["localhost"], address="localhost:1")
    enroll_client(tmp_path / "other", "one", tmp_path / "one")
    with refuses(ServerLostError, "does not answer"):
        connect(server, tmp_path / "one")
    with grpc.insecure_channel(f"localhost:{server.port}") as channel, pytest.raises(grpc.RpcError):
        list(channel.stream_stream(f"/{SERVICE}/Hello")(frames(b""), timeout=5))
    assert connect(server, federation / "one").adapter()


def test_a_bundle_of_another_base_is_refused(federation, serve) -> None:
    server = serve(tiny_backbone(seed=1))
    with refuses(TransportError, "another base"):
        connect(server, federation / "one")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_values_that_would_poison_are_refused_before_they_meet_anything(federation, serve, value, method) -> None:
    server = serve()
    one, two = connect(server, federation / "one"), connect(server, federation / "two")
    before = {name: tensor.clone() for name, tensor in two.adapter().items()}
    states, lengths = drawn(1, 2), torch.tensor([2])
    one.forward(states, lengths, StageCall(), keep_as=1)
    bad = states.clone()
    bad[0, 1, 3] = value
    message = codec.encode_states(states, lengths, codec.Wire.FLOAT32)
    message.data = bad.numpy().tobytes()
    header = one._header()
    kinds = {"forward": ("Forward", pb.ForwardRequest), "backward": ("Backward", pb.BackwardRequest)}
    name, kind = kinds[method]
    with pytest.raises(grpc.RpcError) as refused:
        raw(server, federation / "one", name, kind(header=header, states=message, step=1))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    after = two.adapter()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_over_a_limit_is_refused(federation, serve) -> None:
    server = serve(limits=ServerLimits(max_rows=2, max_tokens=4, max_caches=1, max_kept=1, max_message_bytes=4096))
    one = connect(server, federation / "one")
    fine = drawn(2, 4)
    one.forward(fine, torch.tensor([4, 4]), StageCall(), keep_as=1)
    with refuses(TransportError, "too many forward passes"):
        one.forward(fine, torch.tensor([4, 4]), StageCall(), keep_as=2)
    with refuses(TransportError, ""):
        one.forward(drawn(3, 4), torch.tensor([4, 4, 4]), StageCall(), keep_as=None)
    with refuses(TransportError, ""):
        one.forward(drawn(1, 5), torch.tensor([5]), StageCall(), keep_as=None)
    one.open_cache()
    with refuses(TransportError, "too many open caches"):
        one.open_cache()
    with refuses(TransportError, "at most 4096"):
        one.forward(drawn(200, 4), torch.full((200,), 4), StageCall(), keep_as=None)


def test_a_lost_server_is_an_error_that_says_what_to_do(federation, serve) -> None:
    server = serve()
    one = connect(server, federation / "one", patience_s=0.5)
    server.stop(0.0)
    with refuses(ServerLostError, "does not answer"):
        one.adapter()


def test_an_adapter_that_would_fill_the_memory_is_refused(federation, serve) -> None:
    server = serve()
    assert connect(server, federation / "two", adapter=AdapterConfig(rank=32)).adapter()
    with refuses(TransportError, "at most 32 is granted"):
        connect(server, federation / "one", adapter=AdapterConfig(rank=33))


def test_changing_settings_again_and_again_leaves_nothing_behind(federation, serve) -> None:
    server = serve()
    for rate in range(1, 6):
        connect(server, federation / "one", training=TrainingConfig(learning_rate=rate / 100))
    assert len(server.tenancies._hosts) == 1
    connect(server, federation / "two")
    assert len(server.tenancies._hosts) == 2


@pytest.mark.parametrize(("steps", "pull"), [(0, 0.0), (5, -1.0), (5, float("nan")), (5, float("inf"))])
def test_a_round_that_makes_no_sense_is_refused(federation, serve, steps, pull) -> None:
    one = connect(serve(), federation / "one")
    one.begin_round(5, LocalObjective(), None)
    request = pb.BeginRoundRequest(header=one._header(), total_steps=steps, proximal_mu=pull, train_a=True)
    with refuses(TransportError, "a round of no steps"):
        one._exchange("BeginRound", request, pb.Done)


@pytest.mark.parametrize("spoil", ["steps", "exp_avg_sq", "none"])
def test_an_optimizer_state_that_makes_no_sense_is_refused(federation, serve, spoil) -> None:
    one = connect(serve(), federation / "one")
    one.set_adapter({name: torch.full_like(tensor, 0.1) for name, tensor in one.adapter().items()})
    one.begin_round(5, LocalObjective(), None)
    states = drawn(2, 3)
    lengths = torch.tensor([3, 2])
    one.forward(states, lengths, StageCall(), keep_as=1)
    one.backward(1, states, lengths)
    one.optimizer_step(1.0)
    kept = one.optimizer_state()
    one.restore_optimizer(kept)
    if spoil == "none":
        bad = {name: tensor for name, tensor in kept.items() if name != "steps"}
    else:
        name = next(name for name in kept if name.startswith(spoil))
        bad = kept | {name: -kept[name] - 1}
    with refuses(TransportError, "an optimizer state"):
        one.restore_optimizer(bad)
    after = one.optimizer_state()
    assert all(torch.equal(kept[name], after[name]) for name in kept)


def test_a_cache_with_masks_of_its_own_takes_no_other(federation, serve) -> None:
    one = connect(serve(), federation / "one")
    cache = one.open_cache()
    one.decode(drawn(1, 3), StageCall(attention_mask=torch.ones(1, 3, dtype=torch.long)), cache)
    sees = torch.tensor([[[True, False, True, True, False], [True, True, False, False, True]]])
    one.decode(drawn(1, 2), StageCall(attention_mask=sees[:, None], lengths=torch.tensor([2])), cache)
    with refuses(TransportError, "refused Decode"):
        one.decode(drawn(1, 1), StageCall(attention_mask=torch.ones(1, 6, dtype=torch.long)), cache)
    with refuses(TransportError, "without an attention mask"):
        one.decode(drawn(1, 1), StageCall(), cache)


def test_rows_and_lengths_that_do_not_meet_the_cache_are_refused(federation, serve) -> None:
    one = connect(serve(), federation / "one")
    cache = one.open_cache()
    mask = torch.ones(2, 4, dtype=torch.long)
    one.decode(drawn(2, 4), StageCall(attention_mask=mask), cache)
    one.reorder_cache(cache, torch.tensor([1, 0]))
    one.decode(drawn(2, 1), StageCall(attention_mask=torch.ones(2, 5, dtype=torch.long)), cache)
    with refuses(TransportError, "refused Decode"):
        one.decode(drawn(3, 1), StageCall(attention_mask=torch.ones(3, 6, dtype=torch.long)), cache)
    one.reorder_cache(cache, torch.tensor([7]))
    with refuses(TransportError, "row 7 of a cache of 2 rows"):
        one.decode(drawn(1, 1), StageCall(attention_mask=torch.ones(1, 6, dtype=torch.long)), cache)
    assert one.adapter()


def _two_caches(one: GrpcTransport) -> tuple[int, int]:
    """Open a cache of two rows, four and three tokens long, and one of two rows of two."""
    cache, other = one.open_cache(), one.open_cache()
    one.decode(drawn(2, 4), StageCall(attention_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])), cache)
    one.decode(drawn(2, 2), StageCall(attention_mask=torch.ones(2, 2, dtype=torch.long)), other)
    return cache, other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [2]}, "row 2 of a cache of 2 rows"),
        ({"rows": [2**32 - 1]}, "row 4294967295 of a cache"),
        ({"rows": []}, "or none"),
        ({"rows": [0] * 5}, "7 rows of a cache"),
        ({"rows": [0] * 99}, "99 rows of a cache"),
        ({"keep": [2]}, "row 2 of a cache of 2 rows"),
        ({"keep": [0] * 99}, "99 rows of a cache"),
        ({"keep": [0], "skip": 1}, "0 of which can go"),
        ({"keep": [1], "skip": 2}, "1 of which can go"),
        ({"skip": 2**32 - 1}, "let go of the first 4294967295 tokens"),
        ({"other": "empty"}, "of an empty one"),
        ({"cache": "empty", "skip": 1}, "a cache of 0"),
        ({"rows": [0] * 3}, "24 tokens that are in caches, at most 23"),
    ],
)
def test_rows_that_cannot_be_appended_are_refused_and_change_nothing(federation, serve, changes, message) -> None:
    one = connect(serve(limits=ServerLimits(max_rows=6, max_cache_tokens=23)), federation / "one")
    cache, other = _two_caches(one)
    named = {"cache": cache, "other": other, "empty": one.open_cache()}
    wanted = {name: named.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    request = pb.AppendRequest(header=one._header(), **({"cache": cache, "other": other, "rows": [0]} | wanted))
    with refuses(TransportError, message):
        one._exchange("AppendRows", request, pb.Done)
    mask = torch.tensor([[1] * 5, [0] + [1] * 4])
    assert one.decode(drawn(2, 1), StageCall(attention_mask=mask), cache).isfinite().all()
    one.append_rows(cache, other, torch.tensor([1]), 0)


def test_rows_of_blocks_that_look_back_a_limited_way_are_not_moved(federation, serve) -> None:
    backbone = tiny_backbone("mistral", sliding_window=4)
    one = connect(serve(backbone), federation / "one", base_sha256=backbone.fingerprint())
    cache, other = _two_caches(one)
    with refuses(TransportError, "look back a limited way"):
        one.append_rows(cache, other, torch.tensor([0]), 0)


def test_users_join_a_running_search_as_in_one_process(federation, serve) -> None:
    backbone = tiny_backbone()
    server = serve(backbone)
    local = CutModel(backbone, PLAN, ADAPTER, TRAINING)
    remote = CutModel(
        backbone, PLAN, ADAPTER, TRAINING, connect=lambda _, plan: connect(server, federation / "one", plan)
    )
    start = random_adapter(local.shapes, seed=4)
    draw = torch.Generator().manual_seed(3)
    words = ("oak", "oat", "oats", "elm", "elder", "elder tree", "yew", "fir", "fir tree of the north")
    prompts = [
        torch.randint(0, 256, (length,), generator=draw).tolist() for length in (9, 4, 13, 2, 6, 11, 3, 5, 8) * 2
    ]
    options = {"beams": 3, "exclude": [[number % 9] for number in range(18)], "places": 4}
    trie = TitleTrie([list(word.encode()) for word in words], 256)
    calls: list[str] = []
    answer = server._answer
    server._answer = lambda method, *rest: calls.append(method) or answer(method, *rest)
    here, there = (dict(walk_titles(cut.client("one", start), prompts, trie, **options)) for cut in (local, remote))
    assert calls.count("AppendRows") >= 2
    assert here.keys() == there.keys() == set(range(18))
    for user, found in here.items():
        assert [items for items, _ in found] == [items for items, _ in there[user]]
        assert [score for _, score in found] == pytest.approx([score for _, score in there[user]], rel=1e-5, abs=1e-5)
    assert not server.tenancies.all()[0].caches


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    "prompts",
    [[[5], [5, 6, 7, 8]], [[5, 6, 7, 8], [9]], [[5], [7]], [[5]], [[1, 2, 3, 9], [1, 2, 3, 4, 5, 6], [1, 2, 8]]],
)
def test_prompts_are_written_on_as_in_one_process(federation, serve, prompts, beams, family) -> None:
    """A row that is only padding so far, or that begins as others do, changes no bit of them."""
    backbone = tiny_backbone(family, **({} if family == "llama" else {"sliding_window": 4}))
    server = serve(backbone)
    local = CutModel(backbone, PLAN, ADAPTER, TRAINING)
    remote = CutModel(
        backbone, PLAN, ADAPTER, TRAINING, connect=lambda _, plan: connect(server, federation / "one", plan)
    )
    start = random_adapter(local.shapes, seed=4)
    options = {"beams": beams, "max_new_tokens": 6, "returned": beams}
    here, there = (generate(cut.client("one", start), prompts, **options) for cut in (local, remote))
    assert torch.equal(here.sequences, there.sequences)
    assert here.prompt_length == there.prompt_length
    if beams > 1:
        assert torch.equal(here.scores, there.scores)
        assert bool(torch.isfinite(here.scores).all())
    assert not server.tenancies.all()[0].caches
