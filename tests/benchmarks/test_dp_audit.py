"""The audit of private training: noise that is missing must be found out, whatever is claimed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.dp_audit import NoiselessLedger, compared
from pplr.config import UserPrivacyConfig
from pplr.privacy.ledger import Ledger


def told(noise_is_there: bool, bound: float) -> dict[str, object]:
    return {
        "noise_multiplier": 3.0,
        "noise_is_there": noise_is_there,
        "claimed_epsilon": 0.5,
        "lower_bound": bound,
    }


def test_a_bound_is_below_the_claim_and_above_it_where_the_noise_is_missing() -> None:
    assert [row["met"] for row in compared([told(True, 0.4), told(False, 0.6)])] == [True, True]
    assert [row["met"] for row in compared([told(True, 0.6), told(False, 0.4)])] == [False, False]
    assert "missing" in str(compared([told(False, 0.4)])[0]["name"])


def test_the_control_claims_and_draws_the_same_but_for_its_noise(tmp_path: Path) -> None:
    private = UserPrivacyConfig(noise_multiplier=3.0, sampling_rate=0.1, users_per_step=10)
    real, control = (kind(tmp_path / kind.__name__, "0", private, "data") for kind in (Ledger, NoiselessLedger))
    with_noise, without = (books.book(0, "start", 20) for books in (real, control))
    assert real.epsilon() == control.epsilon() > 0
    assert with_noise.gaussian((2, 3)).all()
    assert not without.gaussian((2, 3)).any()
    assert np.all((without.uniform(50) > 0) & (without.uniform(50) < 1))
