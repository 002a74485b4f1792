"""Alters requests at random and has a stage server answer them: each is answered or refused, and a bystander is spared.

Run it for long with ``python tests/runtimes/fuzz_codec.py``; ``PPLR_FUZZ_MESSAGES`` and ``PPLR_FUZZ_SEED`` say how long
and from which seed. The first request that is neither answered nor refused by a typed error ends it, in hex.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pplr.backbones.shared_row import SharedRow
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import PplrError
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.codec import Wire
from pplr.runtimes.framing import PROTOCOL, frames, joined
from pplr.runtimes.identity import Identity, ServerIdentity, init_federation, read_server
from pplr.runtimes.stage_server import ServerLimits, StageServer, _RefusedError
from pplr.testing import tiny_backbone

LIMITS = ServerLimits(max_rows=4, max_tokens=16, max_message_bytes=1 << 16, max_tenancies=4)
SPECIAL = (b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 9, b"\x0a\0", b"\0" * 4, b"\1")


def altered(content: bytes, draw: random.Random) -> bytes:
    """Flip, drop, insert, overwrite, repeat or cut, a few times."""
    raw = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        place = draw.randrange(len(raw) + 1)
        kind = draw.randrange(6)
        if kind <= 1 and place < len(raw):
            raw[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del raw[place : place + draw.choice((1, 1, 4, 999))]
        elif kind == 3:
            raw[place:place] = draw.randbytes(draw.choice((1, 4, 9)))
        elif kind == 4:
            special = draw.choice(SPECIAL)
            raw[place : place + len(special)] = special
        elif draw.random() < 0.1:
            raw = bytearray(draw.randbytes(draw.randrange(200)))
        else:
            raw += raw[place:]
    return bytes(raw)


class Target:
    """A server without a network, a bystander on it, and somebody who alters requests."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.backbone = tiny_backbone()
        init_federation(folder, "trees", ["localhost"], address="localhost:1")
        identity: ServerIdentity = read_server(folder)
        self.server = StageServer(self.backbone, identity, "localhost:0", LIMITS, state=folder / "state")
        self.session, self.sequence = 0, 0
        self.hello("bystander")
        self.before = self.bystander()
        self.hello("fuzzer")

    def bystander(self) -> dict[str, torch.Tensor]:
        (session,) = self.server.tenancies.of("bystander")
        return {name: tensor.clone() for name, tensor in session.state().items()}

    def ask(self, who: str, method: str, content: bytes) -> bytes:
        whole = joined(frames(content), LIMITS.max_message_bytes)
        return self.server._answer(method, Identity(who, "client", 1, datetime.now(UTC)), whole)

    def hello(self, who: str) -> None:
        granted = pb.HelloReply.FromString(self.ask(who, "Hello", self.hello_request().SerializeToString()))
        self.session, self.sequence = granted.session, 0

    def hello_request(self) -> Any:
        return pb.HelloRequest(
            version=PROTOCOL, base_sha256=self.server.tenancies.base, input_layers=1, output_layers=1, total_layers=4,
            wires=[pb.WIRE_FLOAT32], adapter_json=AdapterConfig(rank=2).model_dump_json(),
            training_json=TrainingConfig().model_dump_json(), tenant="main", attempt=secrets.randbits(60) + 1,
        )  # fmt: skip

    def request(self) -> tuple[str, Any]:
        """Write a request that is fine, but for its header."""
        draw = self.draw
        lengths = draw.choice(([3, 2], [1, 1], [4]))
        left = draw.random() < 0.3
        states = codec.encode_states(
            torch.randn(len(lengths), max(lengths), 32), torch.tensor(lengths), Wire.FLOAT32, padded_left=left
        )
        if draw.random() < 0.3:
            row = SharedRow(draw.randrange(3), tuple(lengths))
            whole = torch.tensor([row.tokens])
            states = codec.encode_states(torch.randn(1, row.tokens, 32), whole, Wire.FLOAT32, row=row)
        (session,) = self.server.tenancies.of("fuzzer")[:1]
        tensors = codec.encode_tensors(session.host.adapter(session.name))
        cache, step = draw.choice((1, 2, 3)), draw.randrange(1, 4)
        return draw.choice(
            [
                ("Hello", self.hello_request()),
                ("Forward", pb.ForwardRequest(states=states, step=step, keep=draw.random() < 0.7, adapter=True)),
                ("Backward", pb.BackwardRequest(states=states, step=step)),
                ("BeginRound", pb.BeginRoundRequest(total_steps=3, proximal_mu=0.1, has_anchor=True, anchor=tensors)),
                ("OptimizerStep", pb.StepRequest(scale=1.0)),
                ("GradientNorm", pb.NormRequest()),
                ("OpenCache", pb.SimpleRequest()),
                ("Decode", pb.DecodeRequest(
                    cache=cache, states=states, total_tokens=max(lengths), total_lengths=lengths, rows=[]
                )),
                ("AppendRows", pb.AppendRequest(
                    cache=cache, other=draw.choice((1, 2, 3)), rows=[0], keep=draw.choice(([], [0])),
                    skip=draw.randrange(2),
                )),
                ("CloseCache", pb.CacheRequest(cache=cache)),
                ("SetAdapter", pb.TensorsRequest(tensors=tensors)),
                ("RestoreOptimizer", pb.TensorsRequest(
                    tensors=codec.encode_tensors(session.host.optimizer_state(session.name))
                )),
                ("Save", pb.SimpleRequest()),
                ("Restore", pb.SimpleRequest()),
                ("Discard", pb.SimpleRequest()),
            ]
        )  # fmt: skip

    def turn(self) -> str:
        """Send one altered request, and say how it ended."""
        if not any(own.number == self.session for own in self.server.tenancies.of("fuzzer")):
            for own in self.server.tenancies.of("fuzzer"):
                self.server.tenancies.dismiss(own.owner)
            self.hello("fuzzer")
        method, request = self.request()
        head = b""
        if method != "Hello":
            header = pb.Header(session=self.session, sequence=self.sequence + 1)
            head = type(request)(header=header).SerializeToString()
        content = altered(request.SerializeToString(), self.draw)
        try:
            self.ask("fuzzer", method, head + content)
        except (PplrError, _RefusedError) as error:
            return type(error).__name__
        except Exception as error:
            raise AssertionError(f"{method} {(head + content).hex()} ended in {error!r}") from error
        finally:
            found = [own.sequence for own in self.server.tenancies.of("fuzzer") if own.number == self.session]
            self.sequence = found[0] if found else 0
        return "answered"

    def check(self) -> None:
        after = self.bystander()
        assert self.before.keys() == after.keys()
        assert all(torch.equal(self.before[name], after[name]) for name in after)


def fuzz(messages: int, seed: int, folder: Path | None = None) -> Counter[str]:
    """Send so many altered requests, and count how they ended."""
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        target = Target((folder or Path(made)) / "fuzz", seed)
        seen = Counter(target.turn() for _ in range(messages))
        target.check()
        target.server.stop(0.0)
    return seen


if __name__ == "__main__":
    started, count = time.monotonic(), int(os.environ.get("PPLR_FUZZ_MESSAGES", "100000"))
    ended = fuzz(count, int(os.environ.get("PPLR_FUZZ_SEED", "0")))
    print(f"{count} requests in {time.monotonic() - started:.0f} s:", dict(ended.most_common()))
