"""What the stage server keeps of one client's use of it, what it grants, and what state it takes back."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pplr.backbones.adapters import check_adapter
from pplr.backbones.shared_row import SharedRow
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError
from pplr.runtimes.codec import Wire
from pplr.runtimes.stage_state import Owner
from pplr.stages.cut import CutPlan
from pplr.stages.host import StageHost

__all__ = ["CacheState", "Offer", "ServerLimits", "Session", "Settings", "check_optimizer", "check_state"]

_MOMENTS = ("exp_avg.", "exp_avg_sq.", "step.")


@dataclass(frozen=True)
class ServerLimits:
    """What the server grants.

    Args:
        max_rows: Rows of a batch, or of a cache.
        max_tokens: Tokens of a sequence.
        max_message_bytes: Bytes of one request, over all its frames; and of the replies kept for one client's retries.
        max_clients: Clients with a tenancy.
        max_tenancies: Tenancies of one client.
        max_saved: Tenancies of one client on the disk.
        max_tenancy_bytes: Bytes of one client's adapters, gradients and moments.
        max_kept: Forward passes of one tenancy that wait for their backward pass.
        max_kept_tokens: Tokens, with padding, whose activations wait for a backward pass, of one client.
        max_caches: Open key-value caches of one tenancy.
        max_cache_tokens: Tokens, with padding, in the open caches of one client.
        together: Clients whose training passes are computed as one; 1 computes each by itself.
        max_together_tokens: Tokens, with padding, of such a pass.
        concurrent_calls: Calls of one client at once.
        workers: Calls of all clients at once.
        call_timeout_s: Longest time that a call may take to arrive.
        cache_ttl_s: Caches and kept passes of a session that nobody used for so long are let go.
        idle_ttl_s: A tenancy that nobody used for so long is saved, where there is a state folder, and let go.
    """

    max_rows: int = 512
    max_tokens: int = 4096
    max_message_bytes: int = 256 * 2**20
    max_clients: int = 64
    max_tenancies: int = 32
    max_saved: int = 1024
    max_tenancy_bytes: int = 2 << 30
    max_kept: int = 4
    max_kept_tokens: int = 1 << 15
    max_caches: int = 4
    max_cache_tokens: int = 1 << 17
    together: int = 1
    max_together_tokens: int = 1 << 13
    concurrent_calls: int = 8
    workers: int = 64
    call_timeout_s: float = 120.0
    cache_ttl_s: float = 600.0
    idle_ttl_s: float = 24 * 3600.0


@dataclass(frozen=True)
class Settings:
    """What a tenancy belongs to; two tenancies of the same settings share their stage."""

    plan: CutPlan
    adapter: AdapterConfig
    training: TrainingConfig

    def told(self, base: str) -> dict[str, Any]:
        """Write them down, with the base's hash."""
        return {
            "base_sha256": base,
            "plan": [self.plan.input_layers, self.plan.output_layers, self.plan.total_layers],
            "adapter": self.adapter.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Offer:
    """An adapter that an operator offers a tenancy, until a newer one takes its place.

    Args:
        label: By which its owner asks for it.
        tensors: All tensors of a middle adapter.
        at: When it was offered, in seconds of the server's clock.
    """

    label: str
    tensors: Mapping[str, Tensor]
    at: float


@dataclass
class CacheState:
    """What an open cache holds: tokens with padding, real ones of each row, and whether masks were told for it."""

    tokens: int = 0
    lengths: tuple[int, ...] = ()
    told: bool = False


@dataclass
class Session:
    """One process's use of a tenancy, and where its count of requests stands.

    Of the newest request it keeps the method with a hash of the content, and the reply, for when it is sent again.
    """

    owner: Owner
    host: StageHost
    settings: Settings
    wire: Wire
    attempt: int = 0
    number: int = field(default_factory=lambda: secrets.randbits(63))
    sequence: int = 0
    asked: tuple[str, bytes] = ("", b"")
    reply: bytes | None = None
    kept_before: bool = False
    in_round: bool = False
    used: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    kept: dict[int, tuple[int, ...] | SharedRow] = field(default_factory=dict)
    caches: dict[int, CacheState] = field(default_factory=dict)

    @property
    def kept_tokens(self) -> int:
        """Tokens, with padding, whose activations wait: each pass is padded to its longest row."""
        return sum(own.padded if isinstance(own, SharedRow) else len(own) * max(own) for own in self.kept.values())

    @property
    def name(self) -> str:
        """Under which the host knows the tenancy."""
        return str(self.owner)

    def let_go(self) -> None:
        """Let go of kept passes and open caches."""
        self.host.discard(self.name)
        self.kept.clear()
        self.caches.clear()

    def close_cache(self, cache: int) -> None:
        """Let go of one cache, here and in the host."""
        self.caches.pop(cache, None)
        self.host.close_cache(self.name, cache)

    def state(self) -> dict[str, Tensor]:
        """Return adapter and optimizer, flat, without copying."""
        return self.host.adapter(self.name) | self.host.optimizer_state(self.name)

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned, if all of it fits."""
        adapter, optimizer = check_state(tensors, self.host.stage.shapes, self.name)
        self.host.set_adapter(self.name, adapter)
        self.host.restore_optimizer(self.name, optimizer)


def check_optimizer(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an optimizer state that no training could have left.

    Raises:
        TransportError: Says what is wrong with it.
    """

    def refuse(what: str) -> None:
        raise TransportError(f"an optimizer state {what}", cure="Send what was read before, unchanged.")

    if "steps" not in tensors or tensors["steps"].numel() != 1 or not 0 <= int(tensors["steps"]) < 2**31:
        refuse("without a sensible count of steps")
    moments = {name for name in tensors if name != "steps"}
    have = {name.split(".", 1)[1] for name in moments if name.startswith(_MOMENTS)}
    if moments != {prefix + name for name in have for prefix in _MOMENTS} or not have <= shapes.keys():
        refuse("with moments missing, or of no tensor of this stage")
    for name in moments:
        kind, tensor = name.split(".", 1)
        expected = (1,) if kind == "step" else tuple(shapes[tensor])
        if tuple(tensors[name].shape) != expected or tensors[name].dtype != torch.float32:
            refuse(f"whose {kind} of {tensor} is {tuple(tensors[name].shape)} of {tensors[name].dtype}")
        if not bool(torch.isfinite(tensors[name]).all()):
            refuse(f"whose {kind} of {tensor} is not finite")
        if kind != "exp_avg" and bool((tensors[name] < 0).any()):
            refuse(f"with a negative {kind}")


def check_state(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], whose: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part what :meth:`Session.state` returned into adapter and optimizer, and check both."""
    adapter = {name: tensor for name, tensor in tensors.items() if name in shapes}
    optimizer = {name: tensor for name, tensor in tensors.items() if name not in shapes}
    check_adapter(adapter, shapes, whose=whose)
    check_optimizer(optimizer, shapes)
    return adapter, optimizer
