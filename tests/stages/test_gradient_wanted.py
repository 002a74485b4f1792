"""The gradient of what enters the middle stage: computed and sent where the client has a use for it, nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pplr.backbones.base import Backbone, Batch
from pplr.backbones.item_vectors import ItemVectors
from pplr.config import AdapterConfig, ItemVectorsConfig, StatePrivacyConfig, TrainingConfig
from pplr.data.prompts import Sample
from pplr.privacy.states import StateGuard
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.stages.transport import LocalTransport, Traffic
from pplr.testing import random_adapter, same_state, tiny_backbone, tiny_catalog, tiny_encoder, tiny_samples

TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=1)
SETTLED = StatePrivacyConfig(noise="metric", eta=50.0, settle_rounds=1)


def item_vectors() -> ItemVectors:
    backbone = ItemVectors(tiny_backbone(), ItemVectorsConfig(width=8, hidden_width=None))
    source = torch.Generator().manual_seed(5)
    backbone.prepare(tiny_catalog(), lambda texts: torch.randn(len(texts), 32, generator=source))
    return backbone


def encoder() -> Backbone:
    backbone = tiny_encoder()
    backbone.prepare(tiny_catalog(), lambda texts: torch.empty(0))
    return backbone


CASES: dict[str, tuple[Callable[[], Backbone], int, bool, bool]] = {
    "embedding that is frozen": (tiny_backbone, 0, False, False),
    "blocks before the cut": (tiny_backbone, 1, False, True),
    "projection before the cut": (item_vectors, 0, False, True),
    "settled": (item_vectors, 1, True, False),
    "settled, no block": (item_vectors, 0, True, False),
    "tables before the cut": (encoder, 0, False, True),
}
"""The backbone, its blocks before the cut, whether the input stage has settled, and whether it trains."""


class Elsewhere:
    """A transport that a model takes for one that leaves the process, so that micro-batches are in flight."""

    def __init__(self, own: LocalTransport) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def target_modules(backbone: Backbone, *, late: bool) -> tuple[str, ...]:
    if backbone.bidirectional:
        return ("query",)
    return ("down_proj",) if late else ("q_proj", "v_proj")


def client(case: str, *, late: bool = False, in_flight: int = 1) -> tuple[CutModel, ClientModel]:
    make, blocks, is_settled, _ = CASES[case]
    backbone = make()
    adapter = AdapterConfig(rank=2, dropout=0.2, target_modules=target_modules(backbone, late=late))
    cut = CutModel(backbone, CutPlan(blocks, 1, 4), adapter, TRAINING, in_flight=in_flight)
    guard = StateGuard(SETTLED, bytes(32), "client") if is_settled else None
    model = cut.client("one", random_adapter(cut.shapes), guard)
    model.refresh()
    model.settle(3)
    model.begin_round(10)
    return cut, model


def parts_of(model: ClientModel) -> list[Batch]:
    samples = [Sample(own.user, own.history, own.target, every=True) for own in tiny_samples()]
    encoded = model.backbone.encode(samples, tiny_catalog(), 3)
    encoded = list(model.backbone.draw(encoded, 0))
    return [model.backbone.collate(encoded[start : start + 2]) for start in (0, 2, 4)]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have every pass keep the way back to what entered, as if its gradient were wanted."""
    run = StageCall.__init__

    def wanting(own: StageCall, *args: Any, **fields: Any) -> None:
        run(own, *args, **(fields | {"gradient_wanted": True}))

    return lambda: monkeypatch.setattr(StageCall, "__init__", wanting)


@pytest.mark.parametrize("case", CASES)
def test_it_crosses_where_it_is_used_and_nowhere_else(case: str) -> None:
    _, model = client(case)
    (batch, *_) = parts_of(model)
    crossed = batch.tokens * 32 * 4
    loss = model.train_loss(batch, 5)
    assert model.traffic == Traffic(crossed, crossed)
    loss.backward()
    is_wanted = CASES[case][3]
    assert model.traffic == Traffic(2 * crossed, 2 * crossed if is_wanted else crossed)
    trained = [parameter for parameter in model.input_member.parameters.values() if parameter.requires_grad]
    assert any(parameter.grad is not None for parameter in trained) == is_wanted


@pytest.mark.parametrize("case", CASES)
def test_training_ends_with_the_same_bits(case: str, always: Callable[[], None]) -> None:
    ended = []
    for forced in (False, True):
        if forced:
            always()
        _, model = client(case)
        for step in range(2):
            losses = model.train_batch(parts_of(model), [3 * step, 3 * step + 1, 3 * step + 2])
            model.optimizer_step(0.5)
        ended.append((losses, {name: own.clone() for name, own in model.adapter().items()}, model.traffic))
    assert ended[0][0] == ended[1][0]
    assert same_state(ended[0][1], ended[1][1])
    assert (ended[0][2] == ended[1][2]) == CASES[case][3]


@pytest.mark.parametrize("in_flight", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_in_flight_do_the_same(case: str, in_flight: int) -> None:
    ended = []
    for many in (1, in_flight):
        _, model = client(case, in_flight=many)
        if many > 1:
            model.transport = Elsewhere(model.transport)  # type: ignore[assignment]
        losses = model.train_batch(parts_of(model), [1, 2, 3])
        model.optimizer_step(0.5)
        ended.append((losses, {name: own.clone() for name, own in model.adapter().items()}, model.traffic))
    assert ended[0][0] == ended[1][0]
    assert same_state(ended[0][1], ended[1][1])
    assert ended[0][2] == ended[1][2]


def gradients_in(module: torch.nn.Module) -> list[Tensor]:
    """Collect the gradients that reach what a module gives."""
    found: list[Tensor] = []

    def note(_: Any, __: Any, out: Any) -> None:
        states = out[0] if isinstance(out, tuple) else out
        if states.requires_grad:
            states.register_hook(found.append)

    module.register_forward_hook(note)
    return found


@pytest.mark.parametrize("case", ["embedding that is frozen", "settled", "blocks before the cut"])
def test_the_backward_pass_ends_at_the_lowest_trained_layer(case: str) -> None:
    cut, model = client(case, late=True)
    assert cut.host is not None
    lowest, above = cut.host.stage.blocks.layers[:2]
    below, within = gradients_in(lowest.self_attn), gradients_in(above.self_attn)
    (batch, *_) = parts_of(model)
    model.train_loss(batch, 1).backward()
    assert (len(below), len(within)) == (int(CASES[case][3]), 1)


def test_a_middle_stage_that_computes_alone_says_that_nothing_comes_back() -> None:
    cut, _ = client("blocks before the cut")
    assert cut.host is not None
    states = torch.randn(2, 3, 32)
    cut.host.forward("one", states, StageCall(gradient_wanted=False), keep_as=7)
    assert cut.host.backward("one", 7, states) is None
    assert any(own.grad is not None for own in cut.host._of("one").member.parameters.values())
