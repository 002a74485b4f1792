"""The ROC curve equals its definition, and its intervals are of users."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from pplr.errors import DataError
from pplr.privacy.roc import measure_roc
from pplr.testing import refuses


def measured(scores, is_member, users=None):
    scores, is_member = np.array(scores, dtype=float), np.array(is_member, dtype=bool)
    owners = np.arange(len(scores)) if users is None else np.array(users)
    return measure_roc(scores, is_member, owners, np.random.default_rng(0))


def pairs(scores, is_member) -> float:
    """AUC as it is defined: how often a member has the higher score, a tie counting one half."""
    won = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, in_a in zip(scores, is_member, strict=True)
        if in_a
        for b, in_b in zip(scores, is_member, strict=True)
        if not in_b
    ]
    return sum(won) / len(won)


def best_threshold(scores, is_member, rate) -> float:
    """The true-positive rate as it is defined: the best over all thresholds that keep the false ones at the rate."""
    members = [own for own, is_in in zip(scores, is_member, strict=True) if is_in]
    others = [own for own, is_in in zip(scores, is_member, strict=True) if not is_in]
    found = 0.0
    for threshold in [*scores, float("inf")]:
        if sum(own >= threshold for own in others) <= rate * len(others) + 1e-9:
            found = max(found, sum(own >= threshold for own in members) / len(members))
    return found


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_the_area_is_that_of_all_pairs_and_of_sklearn(trials) -> None:
    scores, is_member = zip(*trials, strict=True)
    if len(set(is_member)) < 2:
        return
    told = measured(scores, is_member)
    assert told["auc"]["value"] == pytest.approx(pairs(scores, is_member))
    assert told["auc"]["value"] == pytest.approx(roc_auc_score(is_member, scores))


@pytest.mark.parametrize("decimals", [1, 3])
def test_rates_are_those_of_the_best_threshold_and_of_sklearn(decimals) -> None:
    source = np.random.default_rng(1)
    is_member = np.arange(2200) % 2 == 0
    scores = np.round(source.normal(size=2200) + 1.5 * is_member, decimals)  # with ties
    told = measured(scores, is_member)
    wrong, right, _ = roc_curve(is_member, scores, drop_intermediate=False)
    for rate in (0.01, 0.001):
        value = told[f"tpr@{rate:g}"]["value"]
        assert value == pytest.approx(best_threshold(scores.tolist(), is_member, rate))
        assert value == pytest.approx(right[wrong <= rate].max())


def test_a_rate_that_too_few_non_members_can_show_is_not_told() -> None:
    source = np.random.default_rng(2)
    for others, known in ((99, (False, False)), (100, (True, False)), (999, (True, False)), (1000, (True, True))):
        is_member = np.arange(others + 50) >= others
        told = measured(source.normal(size=others + 50), is_member)
        assert (told["tpr@0.01"] is not None, told["tpr@0.001"] is not None) == known


def test_scores_that_say_nothing_give_one_half_and_no_more() -> None:
    is_member = np.arange(400) % 2 == 0
    told = measured(np.zeros(400), is_member)
    assert told["auc"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert told["tpr@0.01"]["value"] == 0.0  # one threshold takes everybody
    inside = 0
    for seed in range(100):
        scores = np.random.default_rng(seed).normal(size=400)
        found = measured(scores, is_member)["auc"]
        inside += found["low"] <= 0.5 <= found["high"]
    assert inside >= 88


def test_intervals_are_of_users_and_not_of_trials() -> None:
    """Ten copies of each user's trials say no more than one."""
    source = np.random.default_rng(3)
    is_member = np.arange(60) % 2 == 0
    scores = source.normal(size=60) + 0.5 * is_member
    users = np.arange(60) // 2
    one = measured(scores, is_member, users)["auc"]
    ten = measured(np.tile(scores, 10), np.tile(is_member, 10), np.tile(users, 10))["auc"]
    assert ten == pytest.approx(one)
    alone = measured(np.tile(scores, 10), np.tile(is_member, 10))["auc"]
    assert alone["high"] - alone["low"] < 0.5 * (one["high"] - one["low"])


def test_members_alone_have_no_curve() -> None:
    with refuses(DataError, "needs members and non-members"):
        measured([1.0, 2.0], [True, True])
    with refuses(DataError, "not finite"):
        measured([1.0, float("nan")], [True, False])
