"""What attackers see of a unit, and what they make of it, equal their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.config import AdapterConfig, ItemVectorsConfig, TrainingConfig
from pplr.data.prompts import Case, Sample
from pplr.errors import ConfigError
from pplr.privacy.audits.membership import likelihood_ratios, list_gains, unit_losses
from pplr.privacy.audits.membership_units import draw_halves, leave_out
from pplr.recommend.training import evaluation_loss
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import random_adapter, refuses, tiny_catalog, tiny_decoder, tiny_samples, tiny_tokenizer


def test_each_unit_is_in_one_training_of_each_pair_and_halves_are_even_in_each_group() -> None:
    groups = ["a"] * 10 + ["b"] * 7
    included = draw_halves(groups, 4, seed=0)
    assert (included[0::2] != included[1::2]).all()
    assert set(included[:, :10].sum(axis=1).tolist()) == {5}
    assert set(included[:, 10:].sum(axis=1).tolist()) == {3, 4}
    assert (included[0] != included[2]).any()
    assert (included == draw_halves(groups, 4, seed=0)).all()
    assert (included != draw_halves(groups, 4, seed=1)).any()
    with refuses(ConfigError, "a single user or interaction"):
        draw_halves(["a", "a", "b"], 3, seed=0)


def test_an_interaction_leaves_targets_and_histories() -> None:
    window = Sample(0, (1, 2, 3), 4, every=True)
    single = Sample(1, (5, 6), 7)
    assert leave_out([window, single], set()) == [window, single]
    assert leave_out([window, single], {(0, 4), (1, 5), (2, 6)}) == [
        Sample(0, (1, 2), 3, every=True),
        Sample(1, (6,), 7),
    ]
    assert leave_out([window, single], {(0, 1), (0, 2), (0, 3), (1, 7)}) == []  # nothing to predict is left
    assert leave_out([Sample(0, (1, 2, 1), 3, every=True)], {(0, 1)}) == [Sample(0, (2,), 3, every=True)]


@pytest.mark.parametrize("residuals", ["none", "mixed"])
def test_losses_of_many_units_at_once_are_those_of_each_alone(residuals) -> None:
    text = CausalLM(tiny_decoder(layers=2, width=32), tiny_tokenizer(), max_tokens=64, folder="tiny")
    backbone = ItemVectors(text, ItemVectorsConfig(width=16, hidden_width=8, whitening="none", residuals=residuals))
    catalog = tiny_catalog()
    backbone.prepare(catalog, lambda texts: torch.randn(len(texts), 32, generator=torch.Generator().manual_seed(0)))
    model = CutModel(backbone, CutPlan(1, 0, 2), AdapterConfig(rank=2, dropout=0.0), TrainingConfig())
    client = model.client("0", random_adapter(model.shapes, seed=2))
    samples = [Sample(own.user, own.history, own.target, own.user % 2 == 0) for own in tiny_samples()]
    units = [backbone.encode(own, catalog, 10) for own in (samples[:1], samples[1:4], samples[4:])]
    alone = [evaluation_loss(client, own, 1) for own in units]
    assert unit_losses(client, units, 4) == pytest.approx(alone, rel=1e-5)


class Fixed:
    """Ranks items from the highest number down, whatever the history."""

    def scores(self, cases):
        return np.tile(np.arange(8, dtype=np.float32), (len(cases), 1))


def test_lists_are_read_up_to_their_end_and_no_further() -> None:
    def case(target: int, *seen: int) -> Case:
        return Case(0, seen, (target,), seen)

    units = [[case(7, 0)], [case(6, 7)], [case(6, 0), case(0, 1)], [case(4, 0)]]
    gains = list_gains(Fixed(), units, length=3, batch_size=2)
    assert gains == pytest.approx([1.0, 1.0, (1 / np.log2(3)) / 2, 0.0])  # the first place where what is before is seen


@pytest.mark.parametrize("online", [False, True])
def test_likelihood_ratios_are_those_of_plain_loops(online) -> None:
    source = np.random.default_rng(0)
    included = draw_halves(["a"] * 6, 4, seed=1)
    seen = source.normal(size=(8, 6)) + included
    told = likelihood_ratios(seen, included, online=online)
    for training in range(8):
        shadows = [own for own in range(8) if own // 2 != training // 2]
        fits = {}
        for is_in in (True, False):
            values = [[seen[s, u] for s in shadows if included[s, u] == is_in] for u in range(6)]
            means = [np.mean(own) for own in values]
            squares = sum((x - m) ** 2 for own, m in zip(values, means, strict=True) for x in own)
            fits[is_in] = means, np.sqrt(squares / sum(len(own) - 1 for own in values))
        for unit in range(6):
            x = seen[training, unit]
            (inside, s_in), (outside, s_out) = fits[True], fits[False]
            expected = (x - outside[unit]) / s_out
            if online:
                expected = norm.logpdf(x, inside[unit], s_in) - norm.logpdf(x, outside[unit], s_out)
            assert told[training, unit] == pytest.approx(expected)


def test_the_other_training_of_a_pair_is_no_shadow() -> None:
    included = draw_halves(["a"] * 6, 3, seed=1)
    seen = np.random.default_rng(0).normal(size=(6, 6))
    other = seen.copy()
    other[1] += 100
    assert (
        likelihood_ratios(seen, included, online=True)[0] == likelihood_ratios(other, included, online=True)[0]
    ).all()
    with refuses(ConfigError, "2 pairs of trainings are too few"):
        likelihood_ratios(seen[:4], included[:4], online=False)
