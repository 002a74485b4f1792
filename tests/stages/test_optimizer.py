"""The optimizer of a stage against torch's own, and the schedule against transformers'."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

from pplr.config import TrainingConfig
from pplr.errors import CheckpointError, FederationError
from pplr.stages.optimizer import LocalObjective, StageOptimizer, learning_rate
from pplr.testing import refuses

CONFIG = TrainingConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.2)


def tensors(seed: int = 0) -> dict[str, nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return {
        "x.lora_A.weight": nn.Parameter(torch.randn(2, 4, generator=source)),
        "x.lora_B.weight": nn.Parameter(torch.randn(4, 2, generator=source)),
    }


def step(optimizer: StageOptimizer, number: int, scale: float = 1.0) -> float:
    """Give every tensor a gradient that follows from its value and the step, and take the step."""
    for parameter in optimizer.parameters.values():
        if parameter.requires_grad:
            parameter.grad = torch.sin(parameter.detach() * (number + 1))
    squared = optimizer.gradient_norm_squared()
    optimizer.step(scale)
    return squared


@given(st.integers(0, 30), st.integers(1, 60), st.sampled_from(["linear", "constant"]))
def test_the_rate_is_that_of_transformers(warmup: int, total: int, schedule: str):
    config = TrainingConfig(learning_rate=0.3, warmup_steps=warmup, schedule=schedule)
    adam = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    allowed = min(warmup, total // 2)
    if schedule == "linear":
        truth = get_linear_schedule_with_warmup(adam, allowed, total)
    else:
        truth = get_constant_schedule_with_warmup(adam, allowed)
    for number in range(total + 2):
        assert learning_rate(number, total, config) == pytest.approx(truth.get_last_lr()[0], rel=1e-12)
        adam.step()
        truth.step()


def test_steps_are_torch_steps():
    ours, theirs = tensors(), tensors()
    optimizer = StageOptimizer(ours, CONFIG)
    optimizer.begin_round(8, LocalObjective(), None)
    adam = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.2)
    schedule = get_linear_schedule_with_warmup(adam, 2, 8)
    for number in range(6):
        for parameter in theirs.values():
            parameter.grad = torch.sin(parameter.detach() * (number + 1)) * 0.5
        adam.step()
        schedule.step()
        step(optimizer, number, scale=0.5)
        for name, parameter in theirs.items():
            torch.testing.assert_close(ours[name], parameter, rtol=1e-6, atol=1e-7)
    assert optimizer.steps == 6
    assert all(parameter.grad is None for parameter in ours.values())


def test_the_norm_is_that_of_the_gradients():
    optimizer = StageOptimizer(tensors(), CONFIG)
    optimizer.begin_round(4, LocalObjective(), None)
    assert optimizer.gradient_norm_squared() == 0
    wanted = sum(float(torch.sin(p.detach()).double().square().sum()) for p in optimizer.parameters.values())
    assert step(optimizer, 0) == pytest.approx(wanted, rel=1e-12)


def test_the_proximal_term_is_its_derivative():
    anchor = {name: parameter.detach().clone() for name, parameter in tensors(1).items()}
    optimizer = StageOptimizer(tensors(), CONFIG)
    optimizer.begin_round(4, LocalObjective(proximal_mu=0.3), anchor)
    naive = tensors()
    term = sum(0.15 * (naive[name] - anchor[name]).square().sum() for name in naive)
    term.backward()
    squared = optimizer.gradient_norm_squared()
    assert squared == pytest.approx(sum(float(p.grad.double().square().sum()) for p in naive.values()), rel=1e-6)
    for name, parameter in optimizer.parameters.items():
        torch.testing.assert_close(parameter.grad, naive[name].grad)


def test_the_anchor_stands_still_and_goes_with_the_round():
    parameters = tensors()
    optimizer = StageOptimizer(parameters, CONFIG)
    anchor = {name: parameter.detach() for name, parameter in parameters.items()}  # shares the trained tensors
    optimizer.begin_round(4, LocalObjective(proximal_mu=0.3), anchor)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    assert optimizer.gradient_norm_squared() == pytest.approx(16 * 0.3**2, rel=1e-5)
    optimizer.end_round()
    optimizer.step(1.0)
    assert optimizer.gradient_norm_squared() == 0


def test_a_proximal_term_without_an_anchor_is_refused():
    optimizer = StageOptimizer(tensors(), CONFIG)
    with refuses(FederationError, "anchor"):
        optimizer.begin_round(4, LocalObjective(proximal_mu=0.3), None)


def test_freezing_a_leaves_it_without_gradient_and_decay():
    anchor = {name: parameter.detach().clone() for name, parameter in tensors(1).items()}
    parameters, start = tensors(), tensors()
    optimizer = StageOptimizer(parameters, CONFIG)
    optimizer.begin_round(8, LocalObjective(train_a=False, proximal_mu=1.0), anchor)
    for number in range(3):
        step(optimizer, number)
    assert torch.equal(parameters["x.lora_A.weight"], start["x.lora_A.weight"])
    assert not torch.equal(parameters["x.lora_B.weight"], start["x.lora_B.weight"])
    optimizer.begin_round(8, LocalObjective(), None)
    step(optimizer, 3)
    assert not torch.equal(parameters["x.lora_A.weight"], start["x.lora_A.weight"])


@pytest.mark.parametrize("before", [0, 3])
def test_a_restored_state_goes_on_bitwise(before: int):
    one = StageOptimizer(tensors(), CONFIG)
    one.begin_round(10, LocalObjective(), None)
    for number in range(before):
        step(one, number)
    state = {name: tensor.clone() for name, tensor in one.state().items()}
    other = StageOptimizer({name: nn.Parameter(p.detach().clone()) for name, p in one.parameters.items()}, CONFIG)
    other.restore(state)
    other.begin_round(10, LocalObjective(), None)
    for number in range(before, before + 4):
        step(one, number)
        step(other, number)
    for name, parameter in one.parameters.items():
        assert torch.equal(other.parameters[name], parameter)
    assert one.state().keys() == other.state().keys()
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in one.state().items())


def test_restoring_takes_a_copy():
    one, other = (StageOptimizer(tensors(), CONFIG) for _ in range(2))
    one.begin_round(10, LocalObjective(), None)
    step(one, 0)
    other.restore(one.state())
    before = {name: tensor.clone() for name, tensor in other.state().items()}
    step(one, 1)
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in before.items())


def test_a_state_of_other_shapes_is_refused():
    one = StageOptimizer(tensors(), CONFIG)
    one.begin_round(10, LocalObjective(), None)
    step(one, 0)
    narrow = StageOptimizer({"x.lora_A.weight": nn.Parameter(torch.zeros(2, 3))}, CONFIG)
    with refuses(CheckpointError, "x.lora_A.weight has shape (2, 4), expected (2, 3)"):
        narrow.restore(one.state())


@pytest.mark.parametrize("kept", ["carry", "reset"])
def test_moments_are_carried_over_or_reset(kept: str):
    config = CONFIG.model_copy(update={"optimizer_state": kept, "warmup_steps": 0})
    optimizer = StageOptimizer(tensors(), config)
    optimizer.begin_round(4, LocalObjective(), None)
    for number in range(3):
        step(optimizer, number)
    optimizer.end_round()
    optimizer.begin_round(4, LocalObjective(), None)
    assert optimizer.steps == (3 if kept == "carry" else 0)
    fresh = StageOptimizer({name: nn.Parameter(p.detach().clone()) for name, p in optimizer.parameters.items()}, config)
    fresh.begin_round(4, LocalObjective(), None)
    step(optimizer, 0)
    step(fresh, 0)
    same = all(torch.equal(optimizer.parameters[name], p) for name, p in fresh.parameters.items())
    assert same == (kept == "reset")


def test_a_stage_without_tensors_counts_steps_alone():
    optimizer = StageOptimizer({}, CONFIG)
    optimizer.begin_round(4, LocalObjective(proximal_mu=1.0), {})
    assert step(optimizer, 0) == 0
    assert {name: int(tensor) for name, tensor in optimizer.state().items()} == {"steps": 1}
    optimizer.restore({"steps": torch.tensor(3)})
    assert optimizer.steps == 3


def test_kept_gradients_add_up_and_are_released_with_noise_as_the_gradient_of_a_step():
    ours = tensors()
    optimizer = StageOptimizer(ours, CONFIG)
    optimizer.begin_round(8, LocalObjective(), None)
    wanted = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in ours.items()}
    for scale in (0.5, 0.0, 2.0):
        for number, (name, parameter) in enumerate(ours.items()):
            parameter.grad = torch.full_like(parameter, number + scale if scale else torch.nan)
            wanted[name] += (number + scale) * scale
        optimizer.keep_gradient(scale)
        assert optimizer.data_norm_squared() == 0.0  # nothing is left for the next user
    optimizer.release_gradient(lambda shape: torch.full(shape, 3.0, dtype=torch.float64), 4.0)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, ((wanted[name] + 3.0) / 4.0).float())
    optimizer.step(1.0)
    optimizer.release_gradient(lambda shape: torch.zeros(shape, dtype=torch.float64), 4.0)
    assert not any(parameter.grad.any() for parameter in ours.values())  # a released sum is not released again


def test_a_round_and_an_error_let_go_of_what_is_kept():
    ours = tensors()
    optimizer = StageOptimizer(ours, CONFIG)
    for let_go in (optimizer.clear_gradients, lambda: optimizer.begin_round(8, LocalObjective(), None)):
        for parameter in ours.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.keep_gradient(1.0)
        let_go()
        optimizer.release_gradient(lambda shape: torch.zeros(shape, dtype=torch.float64), 1.0)
        assert not any(parameter.grad.any() for parameter in ours.values())
        optimizer.clear_gradients()


def test_the_norm_of_the_data_s_gradients_leaves_out_the_proximal_term():
    ours = tensors()
    optimizer = StageOptimizer(ours, CONFIG)
    anchor = {name: parameter.detach() + 1 for name, parameter in ours.items()}
    optimizer.begin_round(8, LocalObjective(proximal_mu=0.3), anchor)
    for parameter in ours.values():
        parameter.grad = torch.ones_like(parameter)
    assert optimizer.data_norm_squared() == 16.0
    assert optimizer.gradient_norm_squared() == pytest.approx(16 * 0.7**2)
