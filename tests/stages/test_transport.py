"""The transport that stays in the process keeps the contract of all transports."""

from __future__ import annotations

from pplr.stages.cut import CutPlan
from pplr.stages.host import StageHost
from pplr.stages.transport import LocalTransport, Traffic, Transport
from pplr.testing import TransportContract


class TestLocalTransport(TransportContract):
    def connect(self, host: StageHost, client: str) -> Transport:
        return LocalTransport(host, client)


class TestLocalTransportToTheWholeStack(TestLocalTransport):
    plan = CutPlan(0, 0, 4)


def test_a_reading_stands_still():
    traffic = Traffic(3, 5)
    before = traffic.reading()
    traffic.bytes_up += 10
    assert before == Traffic(3, 5)
    assert traffic.since(before) == Traffic(10, 0)
