"""Curriculum heating against the figures that were worked out by hand from the paper's formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.errors import FederationError
from pplr.federation.heating import heating_weight, loss_share

REFERENCE = {"heating_scale": 0.7, "heating_horizon": 5.0}
LOSSES = st.lists(st.floats(0.1, 12), min_size=1, max_size=6)


def heated(losses, server_round):
    shares = loss_share(losses, temperature=0.05)
    return shares, [heating_weight(float(share), server_round, **REFERENCE) for share in shares]


def test_reference_values_of_equal_losses():
    shares, first = heated([2.0] * 5, 0)
    _, second = heated([2.0] * 5, 1)
    assert shares.tolist() == pytest.approx([0.2] * 5)
    assert first == pytest.approx([0.747] * 5, abs=5e-4)
    assert second == pytest.approx([0.9999] * 5, abs=5e-5)


def test_reference_values_of_one_client_that_lags():
    losses = [2.09, 2.08, 2.21, 2.12, 2.09]
    shares, first = heated(losses, 0)
    _, second = heated(losses, 1)
    assert shares.tolist() == pytest.approx([0.06, 0.05, 0.70, 0.12, 0.06], abs=8e-3)
    assert first == pytest.approx([0.84, 0.85, 0.64, 0.79, 0.84], abs=6e-3)
    assert second == pytest.approx([1, 1, 0.79, 1, 1], abs=6e-3)


@given(LOSSES, st.floats(0.01, 5))
def test_the_share_is_the_softmax_written_out(losses, temperature):
    powers = [math.exp((loss - max(losses)) / temperature) for loss in losses]
    expected = [power / sum(powers) for power in powers]
    assert loss_share(losses, temperature=temperature).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(
    st.floats(1e-3, 1),
    st.integers(0, 8),
    st.floats(0.05, 3),
    st.floats(0.5, 20),
)
def test_the_weight_is_the_formula_written_out(share, server_round, scale, horizon):
    found = heating_weight(share, server_round, heating_scale=scale, heating_horizon=horizon)
    assert found == pytest.approx(math.tanh(scale / share ** (server_round + 1 / horizon)), rel=1e-9)
    assert 0 < found <= 1


@given(LOSSES.filter(lambda losses: len(losses) > 1), st.integers(0, 5))
def test_the_higher_the_loss_the_less_a_client_opens(losses, server_round):
    _, weights = heated(losses, server_round)
    by_loss = [weights[i] for i in np.argsort(losses)]
    assert by_loss == sorted(by_loss, reverse=True)


@given(LOSSES, st.integers(0, 5))
def test_every_client_opens_as_rounds_go_by(losses, server_round):
    _, now = heated(losses, server_round)
    _, later = heated(losses, server_round + 1)
    assert all(after >= before for before, after in zip(now, later, strict=True))


def test_shares_and_weights_stay_finite_where_the_softmax_is_winner_takes_all():
    shares, weights = heated([1.0, 500.0, 2.0], 60)
    assert shares.tolist() == [0.0, 1.0, 0.0]
    assert weights == [1.0, pytest.approx(math.tanh(0.7)), 1.0]


def test_no_heating_is_a_weight_of_one():
    assert heating_weight(0.99, 0, heating_scale=None, heating_horizon=5) == 1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss):
    with pytest.raises(FederationError, match=r"not finite.*Lower training.learning_rate"):
        loss_share([1.0, loss], temperature=0.05)
