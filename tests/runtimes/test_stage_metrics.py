"""What the stage server counts: who asked what, how long it took, how much it holds; nothing of a tensor."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError
from pplr.runtimes.identity import enroll_client, init_federation, read_kit, read_server
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_client import GrpcTransport
from pplr.runtimes.stage_metrics import StageMetrics
from pplr.runtimes.stage_server import StageServer
from pplr.stages.cut import CutPlan
from pplr.stages.stage import StageCall
from pplr.testing import refuses, tiny_backbone

SECRET = 0.123456789


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[StageServer, GrpcTransport]]:
    """A server with a port for metrics, and a client that has a pass and a cache open."""
    init_federation(tmp_path / "ca", "trees", ["localhost"], address="localhost:1")
    enroll_client(tmp_path / "ca", "one", tmp_path / "one")
    backbone = tiny_backbone()
    server = StageServer(backbone, read_server(tmp_path / "ca"), "localhost:0", metrics_address="127.0.0.1:0")
    server.start()
    channel = StageChannel(f"localhost:{server.port}", read_kit(tmp_path / "one"), patience_s=0.0)
    transport = GrpcTransport(
        channel, "secret tenant", CutPlan(1, 1, 4), base_sha256=backbone.fingerprint(), width=32,
        adapter=AdapterConfig(rank=2), training=TrainingConfig(),
    )  # fmt: skip
    transport.set_adapter({name: torch.full_like(t, SECRET) for name, t in transport.adapter().items()})
    transport.forward(torch.full((1, 2, 32), SECRET), torch.tensor([2]), StageCall(), keep_as=1)
    transport.open_cache()
    yield server, transport
    channel.close()
    server.stop(0.0)


def read(server: StageServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=5) as told:
        return str(told.read().decode())


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in:\n{text}"
    return float(found[1])


def test_prometheus_reads_requests_latencies_bytes_sessions_and_memory(served) -> None:
    server, transport = served
    with refuses(TransportError, ""):
        transport.backward(9, torch.ones(1, 2, 32), torch.tensor([2]))
    text = read(server)
    assert value(text, 'pplr_stage_requests_total{client="one",code="OK",method="Forward"}') == 1
    assert value(text, 'pplr_stage_requests_total{client="one",code="FAILED_PRECONDITION",method="Backward"}') == 1
    assert value(text, 'pplr_stage_request_seconds_count{method="Forward"}') == 1
    assert 0 < value(text, 'pplr_stage_request_seconds_sum{method="Forward"}') < 10
    assert value(text, 'pplr_stage_wait_seconds_count{method="Forward"}') == 1
    assert value(text, 'pplr_stage_bytes_total{client="one",direction="received"}') > 256
    assert value(text, 'pplr_stage_bytes_total{client="one",direction="sent"}') > 256
    assert value(text, "process_resident_memory_bytes") > 1 << 20
    held = {name: value(text, f"pplr_stage_{name}") for name in
            ("tenancies", "clients", "rounds", "kept_passes", "open_caches", "waiting_calls")}  # fmt: skip
    assert held == {
        "tenancies": 1, "clients": 1, "rounds": 0, "kept_passes": 1, "open_caches": 1, "waiting_calls": 0
    }  # fmt: skip
    transport.discard()
    text = read(server)
    assert (value(text, "pplr_stage_kept_passes"), value(text, "pplr_stage_open_caches")) == (0, 0)


def test_nothing_of_a_tensor_or_of_what_a_client_wrote_is_told(served) -> None:
    server, _ = served
    text = read(server)
    for secret in ("0.1234", "secret", "lora", "layers"):
        assert secret not in text
    names = {name for line in text.splitlines() if "{" in line for name in re.findall(r'(\w+)="', line)}
    assert names <= {"client", "method", "code", "direction", "le"}


def test_a_stopped_server_gives_its_port_back(served) -> None:
    server, _ = served
    port = server.metrics_port
    assert read(server)
    server._stop_metrics()
    server._stop_metrics = lambda: None
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0", ":0", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:-1"]
)
def test_only_an_address_of_this_machine_is_taken(address) -> None:
    with refuses(TransportError, "only a loopback address"):
        StageMetrics().listen(address)


def test_a_port_that_is_taken_or_that_is_none_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, refuses(TransportError, "cannot listen"):
        StageMetrics().listen(f"127.0.0.1:{taken.getsockname()[1]}")
    with refuses(TransportError, "cannot listen"):
        StageMetrics().listen("127.0.0.1:99999")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_loopback_address_is_taken(host) -> None:
    metrics = StageMetrics()
    metrics.request("one", "Hello", "OK")
    port, stop = metrics.listen(f"{host}:0")
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=5) as told:
            assert told.read().decode().splitlines()[-1] == metrics.text().splitlines()[-1]
    finally:
        stop()
