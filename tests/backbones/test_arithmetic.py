"""Wide products of bfloat16 factors: the exact product, rounded once, on whatever processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pplr.backbones import arithmetic
from pplr.backbones.arithmetic import WideLinear, is_widened, multiplies_bfloat16, widen
from pplr.config import AdapterConfig, TrainingConfig
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import random_adapter, tiny_backbone, tiny_catalog, tiny_samples

HALF_STEP = 2.0**-8
"""Largest relative error of rounding to bfloat16 once, with room for the order of additions."""


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda: False)


def layer(width_in: int, width_out: int, *, bias: bool, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width_in, width_out, bias=bias).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize(("rows", "states"), [(3, 4), (2048, 512)])
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_a_wide_product_and_its_gradient_are_the_exact_ones_rounded_once(
    rows, states, width_in, width_out, bias, seed
) -> None:
    narrow = layer(width_in, width_out, bias=bias, seed=seed)
    narrow.__class__ = WideLinear
    before = arithmetic._ROWS, arithmetic._STATES
    arithmetic._ROWS, arithmetic._STATES = rows, states
    try:
        x = torch.randn(2, 5, width_in).to(torch.bfloat16).requires_grad_()
        out = narrow(x)
        grad = torch.randn_like(out)
        out.backward(grad)
    finally:
        arithmetic._ROWS, arithmetic._STATES = before
    assert x.grad is not None
    weight = narrow.weight.double()
    exact = x.detach().double() @ weight.t() + (narrow.bias.double() if bias else 0.0)
    scale = x.detach().double().abs() @ weight.abs().t() + 1.0
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert bool(((out.double() - exact).abs() <= HALF_STEP * exact.abs() + 1e-6 * scale).all())
    exact = grad.double() @ weight
    scale = grad.double().abs() @ weight.abs() + 1.0
    assert bool(((x.grad.double() - exact).abs() <= HALF_STEP * exact.abs() + 1e-6 * scale).all())


def test_only_slow_bfloat16_is_widened(slow) -> None:
    assert is_widened(torch.zeros(1, dtype=torch.bfloat16))
    assert not is_widened(torch.zeros(1))
    module = nn.Sequential(layer(2, 2, bias=False), nn.Linear(2, 2))
    tensors = [p.data_ptr() for p in module.parameters()]
    widen(module)
    assert [type(own) for own in module] == [WideLinear, nn.Linear]
    assert [p.data_ptr() for p in module.parameters()] == tensors


def test_a_fast_processor_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda: True)
    module = nn.Sequential(layer(2, 2, bias=False))
    widen(module)
    assert type(module[0]) is nn.Linear


def test_the_processor_is_asked_once() -> None:
    assert multiplies_bfloat16() is multiplies_bfloat16()


def test_a_widened_model_is_cut_as_it_is_whole_and_learns_what_the_float32_one_learns(slow) -> None:
    ended = {}
    for dtype in (torch.float32, torch.bfloat16):
        for plan in (CutPlan.make(None, 4), CutPlan(1, 1, 4)):
            model = tiny_backbone().model.to(dtype)
            backbone = type(tiny_backbone())(model, tiny_backbone().tokenizer, max_tokens=512, folder="tiny")
            cut = CutModel(backbone, plan, AdapterConfig(rank=2, dropout=0.1), TrainingConfig(learning_rate=0.01))
            client = cut.client("one", random_adapter(cut.shapes))
            batch = backbone.collate(backbone.encode(tiny_samples(), tiny_catalog(), 3))
            client.begin_round(3)
            losses = []
            for step in range(3):
                loss = client.train_loss(batch, step)
                (loss / batch.targets).backward()
                client.optimizer_step(1.0)
                losses.append(float(loss.detach()) / batch.targets)
            ended[dtype, plan.is_whole] = losses
    assert ended[torch.bfloat16, True] == ended[torch.bfloat16, False]
    assert ended[torch.bfloat16, True] == pytest.approx(ended[torch.float32, True], rel=0.02)
