"""The server's side: who may ask for what, and what is let go when."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import AdapterError, TransportError
from pplr.seeds import derive_seed
from pplr.stages.cut import CutPlan
from pplr.stages.host import StageHost
from pplr.stages.optimizer import LocalObjective
from pplr.stages.stage import StageCall
from pplr.testing import random_adapter, refuses, tiny_backbone

STATES = torch.linspace(-1, 1, 2 * 3 * 32).reshape(2, 3, 32)
CALL = StageCall()


@pytest.fixture
def host() -> StageHost:
    host = StageHost(
        tiny_backbone(), CutPlan(1, 1, 4), AdapterConfig(rank=2), TrainingConfig(learning_rate=0.01, warmup_steps=0)
    )
    host.admit("one", random_adapter(host.stage.shapes))
    return host


USES: dict[str, Callable[[StageHost, str], object]] = {
    "forward": lambda host, client: host.forward(client, STATES, CALL, keep_as=1),
    "evaluate": lambda host, client: host.forward(client, STATES, CALL, keep_as=None),
    "backward": lambda host, client: host.backward(client, 1, STATES),
    "discard": lambda host, client: host.discard(client),
    "begin_round": lambda host, client: host.begin_round(client, 1, LocalObjective(), None),
    "gradient_norm_squared": lambda host, client: host.gradient_norm_squared(client),
    "optimizer_step": lambda host, client: host.optimizer_step(client, 1.0),
    "end_round": lambda host, client: host.end_round(client),
    "open_cache": lambda host, client: host.open_cache(client),
    "decode": lambda host, client: host.decode(client, STATES, CALL, 1),
    "reorder_cache": lambda host, client: host.reorder_cache(client, 1, torch.tensor([0])),
    "append_rows": lambda host, client: host.append_rows(client, 1, 2, torch.tensor([0]), 0),
    "close_cache": lambda host, client: host.close_cache(client, 1),
    "adapter": lambda host, client: host.adapter(client),
    "set_adapter": lambda host, client: host.set_adapter(client, {}),
    "optimizer_state": lambda host, client: host.optimizer_state(client),
    "restore_optimizer": lambda host, client: host.restore_optimizer(client, {}),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_stranger_is_refused(host: StageHost, use: Callable[[StageHost, str], object]):
    with refuses(TransportError, "client 'two' was never admitted"):
        use(host, "two")
    host.dismiss("one")
    with refuses(TransportError, "client 'one' was never admitted"):
        use(host, "one")


def test_admitting_twice_is_refused_and_changes_nothing(host: StageHost):
    before = {name: tensor.clone() for name, tensor in host.adapter("one").items()}
    with refuses(TransportError, "admitted before"):
        host.admit("one", random_adapter(host.stage.shapes, seed=9))
    assert all(torch.equal(host.adapter("one")[name], tensor) for name, tensor in before.items())


def test_admitting_with_an_adapter_that_does_not_fit_is_refused(host: StageHost):
    start = random_adapter(host.stage.shapes)
    name = next(iter(start))
    with refuses(AdapterError, "lacks"):
        host.admit("two", {key: tensor for key, tensor in start.items() if key != name})
    with refuses(AdapterError, "shape"):
        host.admit("two", start | {name: torch.zeros(3)})
    host.admit("two", start | {"of another stage": torch.zeros(3)})


def test_a_gradient_without_a_pass_is_refused(host: StageHost):
    with refuses(TransportError, "no forward pass of step 1 is kept for client 'one'"):
        host.backward("one", 1, STATES)
    host.forward("one", STATES, CALL, keep_as=None)  # keeps nothing
    with refuses(TransportError, "no forward pass"):
        host.backward("one", 1, STATES)
    host.forward("one", STATES, CALL, keep_as=1)
    host.admit("two", random_adapter(host.stage.shapes))
    with refuses(TransportError, "client 'two'"):
        host.backward("two", 1, STATES)  # another's pass is not its own
    host.backward("one", 1, STATES)
    with refuses(TransportError, "no forward pass"):
        host.backward("one", 1, STATES)


def test_a_step_number_twice_is_refused_and_the_first_stays(host: StageHost):
    host.forward("one", STATES, CALL, keep_as=1)
    with refuses(TransportError, "step 1 of client 'one' ran forward twice"):
        host.forward("one", STATES * 2, CALL, keep_as=1)
    host.backward("one", 1, STATES)
    host.forward("one", STATES, CALL, keep_as=1)  # after its backward pass the number is free


def test_a_closed_cache_is_refused(host: StageHost):
    cache = host.open_cache("one")
    host.admit("two", random_adapter(host.stage.shapes))
    with refuses(TransportError, f"client 'two' has no open cache {cache}"):
        host.decode("two", STATES, CALL, cache)
    host.close_cache("one", cache)
    for use in (
        lambda: host.decode("one", STATES, CALL, cache),
        lambda: host.reorder_cache("one", cache, torch.tensor([0])),
        lambda: host.close_cache("one", cache),
    ):
        with refuses(TransportError, f"no open cache {cache}"):
            use()
    assert host.open_cache("one") != cache


def _kept(host: StageHost, step: int) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(tensor) for tensor in host._of("one").kept[step]]


def _alive(references: list[weakref.ref[torch.Tensor]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_activations_live_from_forward_to_backward(host: StageHost):
    host.forward("one", STATES, CALL, keep_as=1)
    host.forward("one", STATES, CALL, keep_as=2)
    first, second = _kept(host, 1), _kept(host, 2)
    assert (_alive(first), _alive(second)) == (2, 2)
    gradient = host.backward("one", 1, STATES)
    del gradient
    assert (_alive(first), _alive(second)) == (0, 2)
    host.discard("one")
    assert _alive(second) == 0


def test_evaluation_keeps_nothing(host: StageHost):
    leaving = host.forward("one", STATES, CALL, keep_as=None)
    assert not leaving.requires_grad
    assert not host._of("one").kept


def test_what_leaves_carries_no_graph(host: StageHost):
    entering = STATES.clone().requires_grad_(True)
    leaving = host.forward("one", entering, CALL, keep_as=1)
    assert not leaving.requires_grad
    gradient = host.backward("one", 1, torch.ones_like(leaving))
    assert gradient.shape == STATES.shape
    assert entering.grad is None


def test_a_gradient_is_that_of_the_blocks_alone(host: StageHost):
    source = torch.Generator().manual_seed(0)
    upstream = torch.randn(STATES.shape, generator=source)
    call = StageCall(dropout_seed=derive_seed(0, "a step"))
    member = host._of("one").member
    entering = STATES.clone().requires_grad_(True)
    leaving = host.stage.run(member, entering, call)
    wanted = torch.autograd.grad(leaving, [entering, *member.parameters.values()], upstream)
    assert torch.equal(host.forward("one", STATES, call, keep_as=1), leaving)
    assert torch.equal(host.backward("one", 1, upstream), wanted[0])
    for parameter, gradient in zip(member.parameters.values(), wanted[1:], strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_an_adapter_is_taken_in_part_or_not_at_all(host: StageHost):
    new = random_adapter(host.stage.shapes, seed=3)
    first, second, *_ = new
    before = {name: tensor.clone() for name, tensor in host.adapter("one").items()}
    with refuses(AdapterError, f"client one's middle adapter: {second} holds NaN"):
        host.set_adapter("one", {first: new[first], second: new[second] * torch.nan})
    assert all(torch.equal(host.adapter("one")[name], before[name]) for name in before)
    host.set_adapter("one", {first: new[first], "of another stage": torch.zeros(1)})
    changed = [name for name in before if not torch.equal(host.adapter("one")[name], before[name])]
    assert changed == [first]
