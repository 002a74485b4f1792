"""Several clients in one pass against one client at a time, which is the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError
from pplr.stages.cut import CutPlan
from pplr.stages.host import Asked, StageHost
from pplr.stages.stage import StageCall
from pplr.testing import random_adapter, refuses, same_state, tiny_backbone, tiny_encoder

MODELS = {
    "llama": lambda: tiny_backbone("llama"),
    "mistral": lambda: tiny_backbone("mistral", sliding_window=4),
    "qwen2": lambda: tiny_backbone("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": lambda: tiny_backbone("qwen3"),
    "bert": lambda: tiny_encoder("bert"),
    "roberta": lambda: tiny_encoder("roberta"),
}
SHAPES = ((1, 5), (3, 17), (2, 1), (4, 12))
NAMES = ("a", "b", "c", "d")


def host_of(model: Any, dropout: float = 0.3, kind: str = "lora", *, recompute: bool = False) -> StageHost:
    modules = ("query", "value") if model.bidirectional else ("q_proj", "v_proj", "down_proj")
    adapter = AdapterConfig(kind=kind, rank=4, dropout=dropout, target_modules=modules)
    host = StageHost(model, CutPlan(1, 1, 4), adapter, TrainingConfig(), recompute=recompute)
    for number, name in enumerate(NAMES):
        host.admit(name, random_adapter(host.stage.shapes, seed=number, scale=0.1))
    return host


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def asked(step: int = 1, dropout: bool = True) -> list[Asked]:
    found = []
    for number, (name, (rows, tokens)) in enumerate(zip(NAMES, SHAPES, strict=True)):
        lengths = torch.tensor([tokens, *range(1, rows)])
        seed = 10 * step + number if dropout and number != 1 else None  # one of them drops nothing
        found.append(Asked(name, step, drawn((rows, tokens, 32), 7 * step + number), StageCall(None, None, seed,
                           lengths=lengths)))  # fmt: skip
    return found


def upstream(own: Asked) -> Asked:
    """Draw the gradient of what left, which is 0 where padding is."""
    gradient = drawn(tuple(own.hidden_states.shape), len(own.client) + own.hidden_states.shape[0])
    real = torch.arange(gradient.shape[1]) < own.call.lengths[:, None]
    return Asked(own.client, own.step, gradient * real[..., None])


def one_at_a_time(host: StageHost, passes: Sequence[Asked]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    left = {own.client: host.forward(own.client, own.hidden_states, own.call, keep_as=own.step) for own in passes}
    back = {own.client: host.backward(own.client, own.step, upstream(own).hidden_states) for own in passes}
    return left, back


def gradients(host: StageHost, client: str) -> dict[str, Tensor]:
    return {name: p.grad for name, p in host._of(client).member.parameters.items() if p.grad is not None}


def assert_near(one: Tensor, other: Tensor, rounding: float = 0.0) -> None:
    """Compare relative to the largest value, but for what rounding leaves of values that would cancel."""
    assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max()) + rounding


def assert_same_gradients(joint: StageHost, alone: StageHost, name: str) -> None:
    """Compare; where a token is alone, its query has no gradient but the rounding of the others'."""
    found, wanted = gradients(joint, name), gradients(alone, name)
    assert found.keys() == wanted.keys()
    largest = max((float(own.abs().max()) for own in wanted.values()), default=0.0)
    for tensor in wanted:
        assert_near(found[tensor], wanted[tensor], 2 * torch.finfo(torch.float32).eps * largest)


def assert_same(passes: Sequence[Asked], joint: StageHost, alone: StageHost, left: Any, back: Any) -> None:
    outs, ins = one_at_a_time(alone, passes)
    for own in passes:
        real = torch.arange(own.hidden_states.shape[1]) < own.call.lengths[:, None]
        assert_near(left[own.client][real], outs[own.client][real])
        assert_near(back[own.client], ins[own.client])
    for name in NAMES:
        assert_same_gradients(joint, alone, name)


def together(host: StageHost, passes: Sequence[Asked]) -> dict[str, Tensor]:
    return dict(zip([own.client for own in passes], host.forward_together(passes), strict=True))


def back_together(host: StageHost, passes: Sequence[Asked]) -> dict[str, Tensor]:
    found = host.backward_together([upstream(own) for own in passes])
    return dict(zip([own.client for own in passes], found, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", MODELS)
def test_together_is_one_at_a_time(family: str, dropout: float):
    model = MODELS[family]()
    joint, alone = host_of(model, dropout), host_of(model, dropout)
    assert joint.takes_several
    passes = asked()
    left = together(joint, passes)
    assert_same(passes, joint, alone, left, back_together(joint, passes))
    assert not any(tenancy.joint for tenancy in joint._tenancies.values())


@pytest.mark.parametrize("family", MODELS)
def test_blocks_that_run_again_change_no_bit(family: str):
    model = MODELS[family]()
    plain, lean = host_of(model), host_of(model, recompute=True)
    first, second = asked(1), asked(2)
    told = []
    for host in (plain, lean):
        left = [together(host, passes) for passes in (first, second)]
        host.forward("a", first[0].hidden_states, first[0].call, keep_as=3)  # binds an adapter of one client
        back = [back_together(host, passes) for passes in (first, second)]
        told.append([*left, *back, *(gradients(host, name) for name in NAMES)])
    for one, other in zip(*told, strict=True):
        assert same_state(one, other)


def test_each_client_has_its_own_adapter_and_masks():
    host = host_of(tiny_backbone())
    same = drawn((2, 6, 32), 0)
    passes = [
        Asked(name, 1, same, StageCall(dropout_seed=seed)) for name, seed in zip(NAMES, (1, 1, 2, None), strict=True)
    ]
    left = host.forward_together(passes)
    for one in range(4):
        for other in range(one):
            assert float((left[one] - left[other]).abs().max()) > 1e-3
    host.set_adapter("b", host.adapter("a"))
    host.discard("a")
    host.discard("b")
    one, other = host.forward_together([Asked(name, 2, same, StageCall(dropout_seed=1)) for name in "ab"])
    assert_near(one, other)


@pytest.mark.parametrize("first", [("b",), ("a",), ("b", "d"), ("a", "c"), ("d", "c", "b")])
def test_some_gradients_come_before_others(first: tuple[str, ...]):
    model = tiny_backbone()
    joint, alone = host_of(model), host_of(model)
    passes = asked()
    left = together(joint, passes)
    early = [own for own in passes if own.client in first]
    late = [own for own in passes if own.client not in first]
    back = back_together(joint, early) | back_together(joint, late)
    assert_same(passes, joint, alone, left, back)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_together_in_bfloat16_is_one_at_a_time_up_to_its_rounding(family: str, dropout: float):
    """Both are as far from float32 as the eight bits of a bfloat16 number let them, and no farther from each other."""
    model, exact = tiny_backbone(family, dtype=torch.bfloat16), tiny_backbone(family)
    joint, alone, truth = (host_of(own, dropout) for own in (model, model, exact))
    passes = asked()
    narrow = [replace(own, hidden_states=own.hidden_states.bfloat16()) for own in passes]
    left = together(joint, narrow)
    assert all(states.dtype == torch.bfloat16 for states in left.values())
    back = joint.backward_together([replace(upstream(own), hidden_states=upstream(own).hidden_states.bfloat16())
                                    for own in passes])  # fmt: skip
    outs = {own.client: alone.forward(own.client, own.hidden_states, own.call, keep_as=own.step) for own in narrow}
    ins = {own.client: alone.backward(own.client, own.step, upstream(own).hidden_states.bfloat16()) for own in passes}
    one_at_a_time(truth, passes)
    for own, entering in zip(passes, back, strict=True):
        real = torch.arange(own.hidden_states.shape[1]) < own.call.lengths[:, None]
        assert far(left[own.client][real], outs[own.client][real]) < 0.02
        assert far(entering, ins[own.client]) < 0.03
        for tensor, exactly in gradients(truth, own.client).items():
            one, other = gradients(joint, own.client)[tensor], gradients(alone, own.client)[tensor]
            assert one.dtype == torch.float32
            assert far(one, other) < 0.04, tensor
            assert far(one, exactly) < 0.06, tensor


def far(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-3))  # of one token none is


def unwanted(passes: Sequence[Asked], clients: str) -> list[Asked]:
    return [replace(own, call=replace(own.call, gradient_wanted=own.client not in clients)) for own in passes]


@pytest.mark.parametrize("first", ["", "b", "ab", "acd"])
@pytest.mark.parametrize("clients", ["b", "ac", "abcd"])
def test_some_gradients_are_not_wanted(clients: str, first: str):
    model = tiny_backbone()
    joint, alone = host_of(model), host_of(model)
    passes = unwanted(asked(), clients)
    left = together(joint, passes)
    parts = [[own for own in passes if own.client in first], [own for own in passes if own.client not in first]]
    back = {name: own for part in parts if part for name, own in back_together(joint, part).items()}
    outs, ins = one_at_a_time(alone, passes)
    for own in passes:
        real = torch.arange(own.hidden_states.shape[1]) < own.call.lengths[:, None]
        assert_near(left[own.client][real], outs[own.client][real])
        if own.client in clients:
            assert back[own.client] is None
            assert ins[own.client] is None
        else:
            assert_near(back[own.client], ins[own.client])
        assert_same_gradients(joint, alone, own.client)
    assert not any(tenancy.joint for tenancy in joint._tenancies.values())


@pytest.mark.parametrize(("clients", "expected"), [("abcd", 0), ("acd", 1), ("", 1)])
def test_a_pass_that_nobody_wants_back_ends_at_the_lowest_trained_layer(clients: str, expected: int):
    model = tiny_backbone()
    adapter = AdapterConfig(rank=4, dropout=0.0, target_modules=("down_proj",))
    host, seen = StageHost(model, CutPlan(1, 1, 4), adapter, TrainingConfig()), []
    for number, name in enumerate(NAMES):
        host.admit(name, random_adapter(host.stage.shapes, seed=number, scale=0.1))

    def note(_: Any, __: Any, out: Any) -> None:
        if out[0].requires_grad:
            out[0].register_hook(seen.append)

    host.stage.blocks.layers[0].self_attn.register_forward_hook(note)
    passes = unwanted(asked(), clients)
    together(host, passes)
    back_together(host, passes)
    assert len(seen) == expected


def test_gradients_of_several_passes_add_up():
    model = tiny_backbone()
    joint, alone = host_of(model), host_of(model)
    both = [asked(1), asked(2)]
    left = [together(joint, passes) for passes in both]
    back = [back_together(joint, passes) for passes in both]
    assert_same(both[0], joint, joint_free(alone, both[1]), left[0], back[0])


def joint_free(host: StageHost, passes: Sequence[Asked]) -> StageHost:
    one_at_a_time(host, passes)
    return host


def test_one_that_leaves_takes_nothing_from_the_others():
    model = tiny_backbone()
    joint, alone = host_of(model), host_of(model)
    passes = asked()
    left = together(joint, passes)
    joint.discard("b")
    with refuses(TransportError, "no forward pass of step 1"):
        joint.backward_together([upstream(own) for own in passes])
    stay = [own for own in passes if own.client != "b"]
    assert_same(stay, joint, alone, left, back_together(joint, stay))


def test_an_adapter_that_changed_meanwhile_is_its_owners_trouble():
    model = tiny_backbone()
    joint, alone = host_of(model), host_of(model)
    passes = asked()
    left = together(joint, passes)
    joint.set_adapter("b", {name: tensor * 2 for name, tensor in joint.adapter("b").items()})
    with refuses(TransportError, "the adapter of client 'b' changed"):
        joint.backward_together([upstream(own) for own in passes])
    with refuses(TransportError, "the adapter of client 'b' changed"):
        joint.backward("b", 1, upstream(passes[1]).hidden_states)
    stay = [own for own in passes if own.client != "b"]
    assert_same(stay, joint, alone, left, back_together(joint, stay))


def test_numbers_that_are_not_finite_stay_with_their_owner():
    model = tiny_backbone()
    joint, alone = host_of(model), host_of(model)
    joint.set_adapter("b", {name: tensor * 1e25 for name, tensor in joint.adapter("b").items()})
    passes = asked()
    left = together(joint, passes)
    assert not bool(torch.isfinite(left["b"]).all())
    back = back_together(joint, passes)
    joint.discard("b")
    assert_same([own for own in passes if own.client != "b"], joint, alone, left, back)


def test_frozen_factors_get_no_gradient():
    from pplr.stages.optimizer import LocalObjective

    model = tiny_backbone()
    joint, alone = host_of(model), host_of(model)
    for host in (joint, alone):
        for name in NAMES:
            host.begin_round(name, 5, LocalObjective(train_a=name == "a"), None)
    passes = asked()
    left = together(joint, passes)
    assert_same(passes, joint, alone, left, back_together(joint, passes))
    assert all("lora_B" in tensor for tensor in gradients(joint, "b"))


def test_what_cannot_be_together():
    assert not host_of(tiny_encoder("longformer")).takes_several
    assert not host_of(tiny_backbone(), kind="full").takes_several
    yarn = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not host_of(tiny_backbone("llama", rope_parameters=yarn)).takes_several


def test_what_is_refused_keeps_nothing():
    host = host_of(tiny_backbone())
    passes = asked()
    host.forward("b", passes[1].hidden_states, passes[1].call, keep_as=1)
    with refuses(TransportError, "step 1 of client 'b' ran forward twice"):
        host.forward_together(passes)
    assert not any(tenancy.joint for tenancy in host._tenancies.values())
    host.discard("b")
    host.forward_together(passes)
    with refuses(TransportError, "step 1 of client 'a' ran forward twice"):
        host.forward("a", passes[0].hidden_states, passes[0].call, keep_as=1)
    wrong = [upstream(own) for own in passes]
    wrong[2] = Asked("c", 1, drawn((2, 2, 32), 0))
    with refuses(TransportError, "expected (2, 1, 32)"):
        host.backward_together(wrong)
    host.forward_together(asked(2)[:2])
    with refuses(TransportError, "gradients of several passes"):
        host.backward_together([upstream(passes[2]), upstream(asked(2)[0])])
    assert not any(gradients(host, name) for name in NAMES)
