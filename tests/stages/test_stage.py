"""A stage: whose adapter is in it, and what a call asks for."""

from __future__ import annotations

import pytest
import torch

from pplr.config import AdapterConfig, TrainingConfig
from pplr.stages.stage import Member, Stage, StageCall
from pplr.testing import random_adapter, tiny_backbone

STATES = torch.linspace(-1, 1, 2 * 5 * 32).reshape(2, 5, 32)
ADAPTER = AdapterConfig(rank=2, dropout=0.4)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(tiny_backbone(), range(1, 3), ADAPTER)


def member(stage: Stage, seed: int) -> Member:
    return Member(stage, random_adapter(stage.shapes, seed), TrainingConfig())


def test_tensors_are_named_as_in_the_uncut_model(stage: Stage):
    assert list(stage.shapes) == [
        f"base_model.model.model.layers.{block}.self_attn.{module}.{factor}.weight"
        for block in (1, 2)
        for module in ("q_proj", "v_proj")
        for factor in ("lora_A", "lora_B")
    ]
    assert stage.shapes["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"] == (16, 2)


def test_members_take_turns(stage: Stage):
    one, two = member(stage, 1), member(stage, 2)
    first, second = (stage.run(each, STATES, StageCall()) for each in (one, two))
    assert not torch.equal(first, second)
    assert torch.equal(stage.run(one, STATES, StageCall()), first)
    assert torch.equal(stage.run(two, STATES, StageCall()), second)


def test_the_adapter_is_off_for_one_call_only(stage: Stage):
    one, two = member(stage, 1), member(stage, 2)
    with_it = stage.run(one, STATES, StageCall())
    without = stage.run(one, STATES, StageCall(adapter=False))
    assert not torch.equal(with_it, without)
    assert torch.equal(stage.run(two, STATES, StageCall(adapter=False)), without)
    assert torch.equal(stage.run(one, STATES, StageCall()), with_it)


def test_dropout_follows_from_the_seed_of_the_call(stage: Stage):
    one = member(stage, 1)
    calm = stage.run(one, STATES, StageCall())
    first = stage.run(one, STATES, StageCall(dropout_seed=1))
    assert not torch.equal(first, calm)
    assert not torch.equal(stage.run(one, STATES, StageCall(dropout_seed=2)), first)
    torch.rand(3)  # nobody else's draws matter
    assert torch.equal(stage.run(one, STATES, StageCall(dropout_seed=1)), first)
    assert torch.equal(stage.run(one, STATES, StageCall()), calm)


def test_a_member_copies_what_it_starts_from(stage: Stage):
    start = random_adapter(stage.shapes)
    own = Member(stage, start, TrainingConfig())
    with torch.no_grad():
        for parameter in own.parameters.values():
            parameter.zero_()
    assert all(float(tensor.abs().max()) > 0 for tensor in start.values())


def test_an_empty_span_passes_states_on():
    empty = Stage(tiny_backbone(), range(0), ADAPTER)
    assert empty.shapes == {}
    assert empty.stored_bytes() == 0
    assert torch.equal(empty.run(Member(empty, {}, TrainingConfig()), STATES, StageCall(dropout_seed=1)), STATES)
