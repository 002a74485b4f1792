"""What guards states: clipping with its exact derivative, noise of the right law, and what it is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import gamma, kstest, norm

from pplr.config import Config, StatePrivacyConfig
from pplr.privacy.coins import SecretCoins
from pplr.privacy.secret import client_secret, derived
from pplr.privacy.states import StateGuard, clipped, described, gaussian_epsilon, told_of_states

SECRET = bytes(range(32))
GAUSSIAN = StatePrivacyConfig(clip_norm=2.0, noise="gaussian", noise_multiplier=0.5)
METRIC = StatePrivacyConfig(noise="metric", eta=3.0)


def guard(config: StatePrivacyConfig, context: str = "0", secret: bytes = SECRET) -> StateGuard:
    return StateGuard(config, secret, context)


def test_clipping_leaves_short_states_and_shortens_long_ones_along_their_direction():
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    told = clipped(states, 1.5)
    for one, other in zip(states.flatten(0, 1), told.flatten(0, 1), strict=True):
        expected = one * min(1.0, 1.5 / float(one.norm()))
        torch.testing.assert_close(other, expected)
    assert torch.equal(clipped(states, None), states)
    assert torch.equal(clipped(torch.zeros(1, 3), 1.0), torch.zeros(1, 3))


def test_the_derivative_of_clipping_is_exact():
    states = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2

    def double(rows):
        norms = rows.norm(dim=-1, keepdim=True)
        return rows * (2.0 / norms).clamp(max=1.0)

    direction = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    own = states.float().requires_grad_(True)
    (gradient,) = torch.autograd.grad((clipped(own, 2.0) * direction).sum(), own)
    step = 1e-6
    slopes = (double(states + step * direction) - double(states - step * direction)) / (2 * step)
    slope = float((slopes * direction).sum())
    assert slope == pytest.approx(float((gradient.double() * direction).sum()), rel=1e-3)
    assert torch.autograd.grad(clipped(own[:1, :1] * 0, 2.0).sum(), own)[0].isfinite().all()


def test_normal_noise_has_the_size_that_was_asked_for_and_padding_has_none():
    states, lengths = torch.zeros(4, 50, 16), torch.tensor([50, 10, 1, 30])
    noise = guard(GAUSSIAN).states(states, lengths)
    real = torch.arange(50)[None] < lengths[:, None]
    assert torch.equal(noise[~real], states[~real])
    assert kstest(noise[real].flatten().numpy() / (0.5 * 2.0), "norm").pvalue > 1e-3


def test_metric_noise_has_the_density_that_was_asked_for():
    drawn = SecretCoins(SECRET).exponential(4_000, 12, 3.0)
    lengths = np.linalg.norm(drawn, axis=1)
    assert kstest(lengths, gamma(12, scale=1 / 3).cdf).pvalue > 1e-3
    directions = drawn / lengths[:, None]
    assert np.abs(directions.mean(axis=0)).max() < 0.03
    assert np.abs(directions.T @ directions / 4_000 - np.eye(12) / 12).max() < 0.01
    sent = guard(METRIC).states(torch.zeros(1, 4_000, 12))[0].double().norm(dim=-1)
    assert kstest(sent.numpy(), gamma(12, scale=1 / 3).cdf).pvalue > 1e-3


@pytest.mark.parametrize("config", [GAUSSIAN, METRIC], ids=["gaussian", "metric"])
def test_a_pass_that_is_run_again_sends_the_same_and_everything_else_sends_other_noise(config):
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))

    def noise(own: StateGuard, given: torch.Tensor, passes: int = 1, occasion: str = "train 0") -> torch.Tensor:
        own.enter(occasion)
        for _ in range(passes):
            sent = own.states(given)
        return sent - own.clip(given)

    first = noise(guard(config), states)
    assert torch.equal(first, noise(guard(config), states))
    nudged = states.clone()
    nudged[0, 0, 0] = torch.nextafter(nudged[0, 0, 0], torch.tensor(9.0))
    others = [
        noise(guard(config), nudged),
        noise(guard(config), states, passes=2),
        noise(guard(config), states, occasion="train 1"),
        noise(guard(config, "1"), states),
        noise(guard(config, secret=bytes(32)), states),
    ]
    for other in others:
        assert (other - first).abs().min() > 0
    assert len({float(own[0, 0, 0]) for own in (first, *others)}) == 6
    assert (first[0] - first[1]).abs().min() > 0


def test_a_public_pass_is_clipped_and_gets_no_noise():
    states = torch.randn(1, 4, 8) * 5
    assert torch.equal(guard(GAUSSIAN).states(states, public=True), clipped(states, 2.0))
    assert torch.equal(guard(METRIC).states(states, public=True), states)


def test_a_gradient_is_clipped_for_the_summed_loss_and_has_noise_in_its_units():
    config = StatePrivacyConfig(gradient_clip_norm=1.0, gradient_noise_multiplier=2.0)
    gradient, lengths = torch.randn(1, 2_000, 8, generator=torch.Generator().manual_seed(4)), torch.tensor([1_500])
    bare = StatePrivacyConfig(gradient_clip_norm=1.0)
    short = guard(bare).gradient(gradient / 64, lengths, 1 / 64)
    torch.testing.assert_close(short, clipped(gradient, 1.0) / 64)
    noise = (guard(config).gradient(gradient / 64, lengths, 1 / 64) - short) * 64
    assert not noise[:, 1_500:].any()
    assert kstest(noise[:, :1_500].flatten().numpy() / 2.0, "norm").pvalue > 1e-3
    assert torch.equal(guard(GAUSSIAN).gradient(gradient, lengths, 1.0), gradient)


def _exact(vectors: int, noise_multiplier: float, delta: float) -> float:
    """ε of the Gaussian mechanism by the formula of Balle and Wang, for sensitivity 2 √n."""
    mu = 2 * math.sqrt(vectors) / noise_multiplier

    def over(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))) - delta

    return float(brentq(over, 0, mu * mu + 20 * mu))


@pytest.mark.parametrize(("vectors", "sigma"), [(1, 2.0), (51, 1.0), (600, 40.0), (1, 50.0), (1_000, 0.02)])
def test_epsilon_is_that_of_one_gaussian_mechanism_by_an_independent_formula(vectors, sigma):
    expected = _exact(vectors, sigma, 1e-5)
    assert expected <= gaussian_epsilon(vectors, sigma, 1e-5) <= expected * 1.001 + 0.001


def test_an_epsilon_beyond_any_grid_is_an_upper_bound_still():
    expected = _exact(1_000, 0.002, 1e-5)
    assert expected <= gaussian_epsilon(1_000, 0.002, 1e-5) <= 1.01 * expected
    assert gaussian_epsilon(0, 1.0, 1e-5) == 0.0


def test_what_is_promised_is_told_in_figures_and_nothing_where_nothing_is():
    told = told_of_states(GAUSSIAN, {"state": 1, "pass": 4})
    assert told["epsilon"]["states"] == {
        "state": gaussian_epsilon(1, 0.5, 1e-5),
        "pass": gaussian_epsilon(4, 0.5, 1e-5),
    }
    assert told["epsilon"]["gradients"] == {"state": None, "pass": None}
    assert "second cut: no ε" in told["summary"]
    assert "the factor by which training.clip_norm scales each step" in told["note"]
    bounded = StatePrivacyConfig(clip_norm=2.0, noise="metric", eta=3.0)
    assert told_of_states(bounded, {"state": 1, "pass": 4})["epsilon"]["states"] == {"state": 12.0, "pass": 48.0}
    assert "3 times the distance" in told_of_states(METRIC, {"state": 1})["summary"]
    assert "first cut: no ε" in told_of_states(StatePrivacyConfig(clip_norm=1.0), {"state": 1})["summary"]
    both = StatePrivacyConfig(noise="metric", eta=1, gradient_clip_norm=1, gradient_noise_multiplier=4)
    assert described(both) == "metric noise η 1, gradients clipped to 1, with normal noise 4 x clip"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"noise": "gaussian", "noise_multiplier": 1.0}, "clip_norm"),
        ({"noise": "gaussian", "clip_norm": 1.0}, "noise_multiplier"),
        ({"noise": "metric"}, "eta"),
        ({"eta": 1.0}, "metric alone"),
        ({"noise_multiplier": 1.0, "clip_norm": 1.0}, "gaussian alone"),
        ({"gradient_noise_multiplier": 1.0}, "gradient_clip_norm"),
    ],
)
def test_half_a_setting_is_refused(fields, told):
    with pytest.raises(ValidationError, match=told):
        StatePrivacyConfig(**fields)


def test_a_model_that_is_not_cut_sends_nothing_to_guard():
    with pytest.raises(ValidationError, match="not cut"):
        Config.model_validate({"cut": None, "privacy": {"states": {"clip_norm": 1.0}}})


def test_keys_of_a_secret_differ_by_purpose_and_a_secret_stays(tmp_path):
    assert len({derived(SECRET, "states", "a"), derived(SECRET, "states", "b"), derived(SECRET, "coins", "a")}) == 3
    secret = client_secret(tmp_path, "0")
    assert secret == client_secret(tmp_path, "0") != client_secret(tmp_path, "1")
    assert (tmp_path / "0.key").stat().st_mode & 0o777 == 0o600
