"""The audit finds what a training without noise gives away, and no more than the claimed ε in one with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.config import AdapterConfig, ItemVectorsConfig
from pplr.config_files import load_config
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample
from pplr.federation.client import FederatedClient
from pplr.federation.methods import make_method
from pplr.privacy.audits.canary import audit_client, audit_scores, draw_canaries, epsilon_lower_bound
from pplr.privacy.ledger import Ledger
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import tiny_decoder, tiny_tokenizer

ITEMS, CANARIES = 120, 120


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(tuple(f"i{n}" for n in range(ITEMS)), tuple(f"Item {n}" for n in range(ITEMS)))


@pytest.fixture(scope="module")
def backbone(catalog) -> ItemVectors:
    text = CausalLM(tiny_decoder(layers=2, width=32), tiny_tokenizer(), max_tokens=64, folder="tiny")
    made = ItemVectors(text, ItemVectorsConfig(width=32, hidden_width=None, residuals="client", whitening="none"))
    vectors = torch.randn(ITEMS, 32, generator=torch.Generator().manual_seed(0))
    made.prepare(catalog, lambda texts: vectors[: len(texts)])
    return made


def audit(backbone, catalog, tmp_path, *settings: str):
    config = load_config(
        overrides=[
            "federation.rounds=2", "federation.method=local", "training.local_epochs=8", "training.batch_size=4",
            "training.learning_rate=0.01", "training.ends_rate=4", "training.warmup_steps=0", *settings,
        ]
    )  # fmt: skip
    adapter = AdapterConfig(rank=4, dropout=0.0)
    cut = CutModel(backbone, CutPlan(1, 0, 2), adapter, config.training)
    source = np.random.default_rng(3)
    own = draw_canaries(10, ITEMS, 4, source, first_user=1000)
    canaries = draw_canaries(CANARIES, ITEMS, 4, source, first_user=0)
    private = config.privacy.dp
    ledger = Ledger(tmp_path / "privacy", "0", private, "data") if private.is_on else None

    def encode(samples):
        return backbone.encode(samples, catalog, 10)

    def make(included):
        samples: list[Sample] = [*own, *included]
        model = cut.client("0", cut.initial_adapter(0))
        return FederatedClient(
            "0", encode(samples), model, lambda _: {}, owners=[sample.user for sample in samples], books=ledger
        )

    told = audit_client(make, canaries, encode, config, make_method(config.federation), source)
    return told, ledger


def test_a_training_without_noise_is_flagged(backbone, catalog, tmp_path):
    told, _ = audit(backbone, catalog, tmp_path)
    assert told.canaries == CANARIES
    assert told.epsilon > 2


PRIVATE = ("privacy.dp.sampling_rate=0.2", "privacy.dp.users_per_step=12")


@pytest.mark.parametrize("noise", [0.7, 4.0])
def test_the_bound_lies_below_the_claimed_epsilon(backbone, catalog, tmp_path, noise, monkeypatch):
    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(range(32)))
    told, ledger = audit(backbone, catalog, tmp_path, *PRIVATE, f"privacy.dp.noise_multiplier={noise}")
    assert told.epsilon < ledger.epsilon()


def test_a_claim_whose_noise_is_missing_is_found_out(backbone, catalog, tmp_path, monkeypatch):
    """So what keeps the bound down above is the noise, not the clipping or the drawing."""
    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(range(32)))
    monkeypatch.setattr("pplr.privacy.coins.SecretCoins.gaussian", lambda self, shape: np.zeros(tuple(shape)))
    told, ledger = audit(backbone, catalog, tmp_path, *PRIVATE, "privacy.dp.noise_multiplier=8")
    assert told.epsilon > 1.5 > ledger.epsilon()


def test_scores_that_know_nothing_prove_nothing():
    source = np.random.default_rng(0)
    bounds = [audit_scores(source.normal(size=200), source.random(200) < 0.5, delta=1e-5).epsilon for _ in range(200)]
    assert np.mean(np.array(bounds) > 0) <= 0.05  # the confidence holds, three numbers of guesses or not


def test_scores_that_know_everything_prove_what_so_many_guesses_can():
    included = np.random.default_rng(0).random(400) < 0.5
    told = audit_scores(included.astype(float), included, delta=0.0)
    assert told.correct == told.guesses
    assert told.epsilon == pytest.approx(-math.log((0.05 / 3) ** (-1 / told.guesses) - 1), abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_is_bounded_by_its_own_epsilon(epsilon):
    """Its right guesses are a binomial of just the rate that the bound allows."""
    source = np.random.default_rng(1)
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    drawn = [epsilon_lower_bound(int(v), 300, 300, delta=0.0, confidence=0.95) for v in source.binomial(300, rate, 300)]
    assert np.mean(np.array(drawn) > epsilon) <= 0.08
    assert np.mean(drawn) > 0.5 * epsilon


def test_the_bound_is_the_clopper_pearson_bound_on_the_rate_where_delta_is_0():
    epsilon = epsilon_lower_bound(80, 100, 100, delta=0.0, confidence=0.95)
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert binom.sf(79, 100, rate) == pytest.approx(0.05, rel=1e-2)
    assert epsilon_lower_bound(80, 100, 100, delta=1e-3, confidence=0.95) < epsilon
