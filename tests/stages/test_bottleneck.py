"""A learned code at the cut: its rate, its gradient, and that what crosses is the code and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal, kl_divergence

from pplr.config import Config, StatePrivacyConfig, TrainingConfig
from pplr.privacy.states import StateGuard
from pplr.stages.bottleneck import Bottleneck
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.testing.audits import Scene

LEARNED = StatePrivacyConfig(noise="learned", code_width=3, rate_weight=0.5)
SECRET = bytes(range(32))


def trained(bottleneck: Bottleneck) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    start = {name: bottleneck.start(name, source) for name in bottleneck.shapes}
    return {name: own + 0.3 * torch.randn(own.shape, generator=source) for name, own in start.items()}


def test_the_rate_is_the_divergence_from_a_standard_normal():
    bottleneck = Bottleneck(3, 8)
    own = trained(bottleneck)
    mean = bottleneck.mean(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)), own)
    expected = kl_divergence(Normal(mean, bottleneck.deviations(own)), Normal(0.0, 1.0)).sum(dim=-1)
    torch.testing.assert_close(bottleneck.rate(mean, own), expected)


def test_a_code_does_not_depend_on_how_long_its_state_is():
    bottleneck = Bottleneck(3, 8)
    states, own = torch.randn(1, 4, 8), trained(bottleneck)
    torch.testing.assert_close(bottleneck.mean(states, own), bottleneck.mean(9 * states, own))


class _Learned:
    """A model with a code at its cut, and one client."""

    def __init__(self, states: StatePrivacyConfig = LEARNED) -> None:
        scene = Scene("item_vectors", (1, 1))
        self.model = CutModel(scene.backbone, scene.plan, scene.config, TrainingConfig(), states=states)
        start = self.model.initial_adapter(3)
        adapter = {name: scene.adapter.get(name, start[name]) for name in start}
        self.guard = StateGuard(states, SECRET, "0")
        self.guard.enter("train 0")
        self.client = self.model.client("0", adapter, self.guard)
        self.batches = scene.batches()


def test_training_minimises_the_loss_and_the_weighted_rate_and_tells_the_loss():
    own = _Learned()
    batch = own.batches[0]
    loss = own.client.train_loss(batch, None)
    loss.backward()
    ends = own.client._members[0].ends
    got = {name: tensor.grad.clone() for name, tensor in ends.items()}
    for tensor in ends.values():
        tensor.grad = None
    again = _Learned()
    again.client._rate_weight = 0.0
    plain = again.client.train_loss(batch, None)
    plain.backward()
    assert float(loss.detach()) == float(plain.detach())
    bottleneck = again.model.input.bottleneck
    states = again.client.backbone.embed(batch.input_ids, again.client._members[0].ends, None)
    states = again.model.input.run(again.client._members[0], states, StageCall(lengths=batch.lengths))
    other = again.client._members[0].ends
    (0.5 * bottleneck.rate(bottleneck.mean(states, other), other).sum()).backward()  # no padding in a batch of one
    for name, tensor in other.items():
        torch.testing.assert_close(got[name], tensor.grad, rtol=1e-3, atol=1e-4)
    assert got["cut.log_variance"].abs().min() > 0


def test_what_crosses_lies_in_the_span_of_the_code_and_public_passes_have_no_noise():
    own = _Learned()
    states = torch.randn(1, 6, own.client.backbone.hidden_size)
    ends = own.client._members[0].ends
    sent = own.client._guarded(states)
    code = torch.linalg.lstsq(ends["cut.out.weight"].detach(), sent[0].detach().t()).solution  # (r, T)
    torch.testing.assert_close(ends["cut.out.weight"] @ code, sent[0].t(), rtol=1e-4, atol=1e-4)
    bottleneck = own.model.input.bottleneck
    bare = bottleneck.expand(bottleneck.mean(states, ends), ends)
    torch.testing.assert_close(own.client._guarded(states, public=True), bare)
    assert (sent - bare).abs().min() > 0


def test_padding_has_no_noise_and_no_rate():
    own = _Learned()
    batch = own.batches[0]
    longer = replace(
        batch,
        input_ids=torch.cat([batch.input_ids, torch.zeros_like(batch.input_ids[:, :2])], dim=1),
        is_target=torch.cat([batch.is_target, torch.zeros_like(batch.is_target[:, :2])], dim=1),
    )
    found = []
    for one in (batch, longer):
        own = _Learned()
        own.client.guard = None  # noise follows from the bits of codes, which padding may change
        loss = own.client.train_loss(one, None)
        loss.backward()
        found.append((loss.detach(), own.client._members[0].ends["cut.log_variance"].grad))
    torch.testing.assert_close(*found)
    noise = own.guard.normal(torch.zeros(1, 4, 3), torch.tensor([2]))
    assert noise[0, :2].all()
    assert not noise[0, 2:].any()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"noise": "learned"}, "code_width and rate_weight"),
        ({"code_width": 4}, "learned alone"),
        ({"noise": "learned", "code_width": 4, "rate_weight": 1.0, "clip_norm": 1.0}, "clip_norm"),
        ({"settle_rounds": 1}, "set noise"),
        ({"noise": "learned", "code_width": 4, "rate_weight": 1.0, "settle_rounds": 0}, "untrained"),
    ],
)
def test_half_a_setting_is_refused(fields, told):
    with pytest.raises(ValidationError, match=told):
        StatePrivacyConfig(**fields)


def test_what_does_not_go_with_a_code_is_refused():
    learned = {"privacy": {"states": LEARNED.model_dump()}}
    with pytest.raises(ValidationError, match="item_vectors"):
        Config.model_validate(learned)
    learned |= {"backbone": {"name": "item_vectors"}}
    with pytest.raises(ValidationError, match="in_flight"):
        Config.model_validate(learned | {"runtime": {"in_flight": 2}})
    settled = {"privacy": {"states": {"noise": "metric", "eta": 1.0, "settle_rounds": 1}}}
    with pytest.raises(ValidationError, match="item_vectors"):
        Config.model_validate(settled)
