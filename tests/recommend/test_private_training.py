"""Private training against plain loops: what enters the optimizer, how much one user can move it, and the noise."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, PromptConfig, TrainingConfig, UserPrivacyConfig
from pplr.errors import FederationError
from pplr.privacy.coins import SecretCoins
from pplr.recommend.private_training import by_user, private_steps, train_privately
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.joint_optimizer import JointOptimizer
from pplr.stages.model import CutModel
from pplr.stages.optimizer import LocalObjective
from pplr.testing import (
    peft_model,
    random_adapter,
    refuses,
    tiny_backbone,
    tiny_catalog,
    tiny_encoder,
    tiny_samples,
)

CALM = AdapterConfig(rank=2, dropout=0.0)
CUTS = {"cut": CutPlan(1, 1, 4), "whole": CutPlan.make(None, 4)}
TRAINING = TrainingConfig(batch_size=2, learning_rate=0.01, warmup_steps=0, clip_norm=None)
OWNERS = (0, 1, 0, 2, 1, 1)


class Given:
    """Coins whose noise and draws are told."""

    def __init__(self, noise: float = 0.0, tosses: float = 0.0) -> None:
        self._noise, self._tosses = noise, tosses

    def uniform(self, count):
        return np.full(count, self._tosses)

    def gaussian(self, shape):
        return np.full(tuple(shape), self._noise)

    def seed(self):
        return 5


@pytest.fixture(scope="module")
def trees() -> CausalLM:
    backbone = tiny_backbone()
    backbone.prompt = PromptConfig(noun="trees", verb="planted", instruction="Name one.")
    return backbone


@pytest.fixture(scope="module")
def users(trees) -> list:
    return by_user(trees.encode(tiny_samples(), tiny_catalog(), 3), OWNERS)


def client(backbone, plan=CUTS["cut"], adapter=CALM, training=TRAINING) -> ClientModel:
    cut = CutModel(backbone, plan, adapter, training)
    return cut.client("0", random_adapter(cut.shapes, scale=0.1))


def private(**settings) -> UserPrivacyConfig:
    chosen = {"noise_multiplier": 1.0, "sampling_rate": 1.0, "users_per_step": 3.0} | settings
    return UserPrivacyConfig(**chosen)


def train(model, users, told, coins, training=TRAINING, **options):
    return train_privately(model, users, training, told, coins, client="0", rounds=1, **options)


def gradients(model, monkeypatch) -> list[dict]:
    """Write down what each step of the optimizer receives."""
    seen = []
    real = ClientModel.optimizer_step

    def step(self, clip_norm):
        own = [*(member.optimizer for member in self._members)]
        own += [self.transport.optimizer] if self.transport is not None else []
        seen.append({n: p.grad.clone() for o in own for n, p in o.parameters.items() if p.grad is not None})
        return real(self, clip_norm)

    monkeypatch.setattr(ClientModel, "optimizer_step", step)
    return seen


@pytest.mark.parametrize("plan", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("clip_norm", [1e6, 0.5])
def test_what_the_optimizer_receives_equals_a_plain_loop_over_users(trees, users, plan, clip_norm, monkeypatch):
    model = client(trees, plan)
    naive = peft_model(trees, CALM, {name: tensor.clone() for name, tensor in model.adapter().items()})
    parameters = {n.replace(".default", ""): p for n, p in naive.named_parameters() if p.requires_grad}
    wanted = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    clipped = 0
    for own in users:
        naive.zero_grad()
        total, targets = 0.0, 0
        for sample in own:  # one at a time, uncut
            ids = torch.tensor([[*sample.prompt, *sample.answer]])
            logits = naive(input_ids=ids).logits[0, len(sample.prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(sample.answer), reduction="sum")
            targets += len(sample.answer)
        (total / targets).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values()))
        clipped += norm > clip_norm
        for name, parameter in parameters.items():
            wanted[name] += parameter.grad.double() * min(1.0, clip_norm / norm) / 3.0
    assert clipped == (0 if clip_norm > 1 else len(users))
    seen = gradients(model, monkeypatch)
    train(model, users, private(clip_norm=clip_norm), Given())
    assert len(seen) == 1
    assert seen[0].keys() == wanted.keys()
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-4, atol=1e-6)


def test_noise_is_added_once_to_all_that_is_trained_and_divided_by_the_expected_number(trees, users, monkeypatch):
    model = client(trees)
    seen = gradients(model, monkeypatch)
    train(model, users, private(noise_multiplier=2.0, clip_norm=0.25), Given(noise=3.0, tosses=1.0))
    assert seen[0].keys() == model.adapter().keys()
    for gradient in seen[0].values():  # nobody is drawn: noise alone, σ C z / users_per_step
        torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0 * 0.25 * 3.0 / 3.0))


def test_noise_has_the_right_deviation_in_every_tensor(trees, users, monkeypatch):
    model = client(trees, adapter=AdapterConfig(rank=8, dropout=0.0))
    seen = gradients(model, monkeypatch)
    told = private(noise_multiplier=1.5, clip_norm=0.2, sampling_rate=1e-9, users_per_step=2.0)
    monkeypatch.setattr("pplr.recommend.private_training.private_steps", lambda *_: 30)
    train(model, users, told, SecretCoins(bytes(32)), TRAINING.model_copy(update={"learning_rate": 1e-9}))
    assert len(seen) == 30
    for name in seen[0]:
        values = torch.stack([own[name] for own in seen]).double()
        expected = 1.5 * 0.2 / 2.0
        spread = expected / math.sqrt(2 * values.numel())
        assert abs(float(values.std()) - expected) < 5 * spread
        assert abs(float(values.mean())) < 5 * expected / math.sqrt(values.numel())
    first, second = seen[0], seen[1]
    assert all(not torch.equal(first[name], second[name]) for name in first)  # every step draws its own


def test_users_are_drawn_at_the_rate_each_alone(trees, users, monkeypatch):
    drawn = []
    monkeypatch.setattr("pplr.recommend.private_training._backward", lambda _, own, *__: drawn.append(id(own)))
    monkeypatch.setattr("pplr.recommend.private_training.private_steps", lambda *_: 400)
    train(client(trees), users, private(sampling_rate=0.3), SecretCoins(bytes(32)))
    counts = [drawn.count(id(own)) for own in users]
    for count in counts:
        assert abs(count - 120) < 5 * math.sqrt(400 * 0.3 * 0.7)
    assert len(set(counts)) > 1  # not all together


@pytest.mark.parametrize("plan", CUTS.values(), ids=CUTS)
def test_one_user_moves_the_sum_by_at_most_the_clipping_norm_however_many_samples(trees, users, plan, monkeypatch):
    model = client(trees, plan, training=TRAINING.model_copy(update={"batch_size": 8}))
    seen = gradients(model, monkeypatch)
    told = private(clip_norm=0.3)
    start = copy.deepcopy(model.adapter())
    for others in (users[1:], users, [users[0] * 100, *users[1:]]):
        model.set_adapter(start)
        train(model, others, told, Given())
    without, usual, huge = ({name: own * 3.0 for name, own in step.items()} for step in seen)

    def distance(a, b):
        return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a))

    assert distance(usual, without) == pytest.approx(0.3, rel=1e-4)  # it is clipped, and so moves it by just that
    assert distance(huge, without) == pytest.approx(0.3, rel=1e-4)


def test_one_user_s_gradient_depends_on_no_other_user(trees, users):
    """Were batches or draws shared among users, clipping one of them would bound nothing."""
    sums = []
    for others in ([users[0]], [users[0], users[2]], [users[2], users[0]]):
        model = client(trees)
        model.begin_round(1)
        for own in others:
            before = {n: t.clone() for n, t in model._members[1].optimizer._kept.items()}
            loss = model.train_loss(trees.collate(own), 3)
            (loss / 7).backward()
            model.optimizer.keep_gradient(0.1)
            after = model._members[1].optimizer._kept
            if own is users[0]:
                sums.append({n: t - before[n] if n in before else t.clone() for n, t in after.items()})
    for other in sums[1:]:
        for name, tensor in sums[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_user_whose_gradient_is_not_finite_adds_nothing_and_tells_nothing(trees, users, bad, monkeypatch):
    model = client(trees)
    seen = gradients(model, monkeypatch)
    real = type(trees).loss

    def loss(self, states, batch, ends):
        value = real(self, states, batch, ends)
        return value * bad if batch.samples == len(users[1]) else value

    monkeypatch.setattr(type(trees), "loss", loss)
    told, training = private(), TRAINING.model_copy(update={"batch_size": 8})
    start = copy.deepcopy(model.adapter())
    train(model, users, told, Given(), training)
    model.set_adapter(start)
    train(model, [users[0], users[2]], told, Given(), training)
    for name, gradient in seen[0].items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, seen[1][name])


def test_a_frozen_middle_stays_and_its_gradients_are_let_go(trees, users, monkeypatch):
    model = client(trees)
    before = copy.deepcopy(model.adapter())
    seen = gradients(model, monkeypatch)
    training = TRAINING.model_copy(update={"weight_decay": 0.5})
    model = client(trees, training=training)
    train(model, users, private(freeze_middle=True, clip_norm=0.1), Given(noise=1.0), training)
    middle = set(model.transport.adapter())
    assert middle
    assert middle.isdisjoint(seen[0])
    for name, tensor in model.adapter().items():
        assert torch.equal(tensor, before[name]) == (name in middle)


def test_with_a_frozen_the_a_of_lora_gets_no_noise(trees, users, monkeypatch):
    model = client(trees)
    seen = gradients(model, monkeypatch)
    train(model, users, private(), Given(noise=1.0), objective=LocalObjective(train_a=False))
    assert seen[0]
    assert not [name for name in seen[0] if "lora_A" in name]


def test_a_proximal_term_is_added_after_clipping_and_noise(trees, users):
    model = client(trees)
    anchor = {name: tensor + 1.0 for name, tensor in model.adapter().items()}
    received = []
    real = model._members[0].optimizer.step
    model._members[0].optimizer.step = lambda scale: (
        received.extend(p.grad.clone() for p in model._members[0].optimizer.parameters.values()),
        real(scale),
    )
    told = private(clip_norm=0.01)
    train(model, users, told, Given(tosses=1.0), objective=LocalObjective(proximal_mu=2.0), anchor=anchor)
    for gradient in received:  # nobody drawn, no noise: μ (θ - anchor) alone, unclipped
        torch.testing.assert_close(gradient, torch.full_like(gradient, -2.0))


def test_steps_do_not_depend_on_the_users():
    assert [private_steps(1, q) for q in (1.0, 0.5, 0.1, 1 / 3, 0.07)] == [1, 2, 10, 3, 15]


def test_nothing_is_told_but_steps_and_time(trees, users):
    result = train(client(trees), users, private(sampling_rate=0.5), Given())
    assert (result.samples, result.tokens, result.targets, result.loss) == (None, None, None, None)
    assert result.steps == 2
    assert result.seconds > 0


def test_what_the_encoder_draws_of_one_user_follows_from_no_other(monkeypatch):
    encoder = tiny_encoder()
    catalog = tiny_catalog()
    encoder.prepare(catalog, lambda texts: torch.zeros(len(texts), 32))
    samples = [sample.__class__(user, (0, 1, 2, 3), 4) for user, sample in enumerate(tiny_samples())]
    encoded = encoder.encode(samples, catalog, 3)
    asked = []
    monkeypatch.setattr(encoder, "draw", lambda own, seed: asked.append(len(own)) or own)
    train(client(encoder, adapter=AdapterConfig(rank=2, dropout=0.0, target_modules=("query",))),
          by_user(encoded, range(len(encoded))), private(), Given())  # fmt: skip
    assert asked == [1] * len(encoded)


def test_errors(trees, users):
    with refuses(FederationError, "no training samples"):
        train(client(trees), [], private(), Given())
    with refuses(FederationError, "noise"):
        train(client(trees), users, UserPrivacyConfig(), Given())


def test_after_an_error_nothing_is_kept(trees, users, monkeypatch):
    model = client(trees)
    monkeypatch.setattr(JointOptimizer, "release_gradient", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, users, private(), Given())
    monkeypatch.undo()
    seen = gradients(model, monkeypatch)
    train(model, users, private(), Given(noise=1.0, tosses=1.0))
    for gradient in seen[0].values():
        torch.testing.assert_close(gradient, torch.full_like(gradient, 1.0 / 3.0))
