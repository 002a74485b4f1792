"""What is spent is written before it is spent, and nothing takes it back."""

from __future__ import annotations

import json
import stat

import pytest

from pplr.config import UserPrivacyConfig
from pplr.config_files import load_config
from pplr.errors import ConfigError, FederationError, RunError, StorageError
from pplr.privacy.accounting import epsilon_of
from pplr.privacy.ledger import Ledger, planned_epsilon, refuse_over_budget
from pplr.testing import refuses

PRIVATE = UserPrivacyConfig(noise_multiplier=1.0, sampling_rate=0.25)


@pytest.fixture
def opened(tmp_path):
    return lambda private=PRIVATE, data="data", client="0": Ledger(tmp_path / "privacy", client, private, data)


def test_what_is_booked_is_on_disk_before_the_randomness_is_handed_out(opened, tmp_path, monkeypatch):
    def refuse(*_):
        raise StorageError("no", cure="x")

    ledger = opened()
    ledger.book(0, "start", 4)
    monkeypatch.setattr("pplr.privacy.ledger.write_json", refuse)
    with refuses(StorageError):
        ledger.book(1, "later", 4)
    monkeypatch.undo()
    booked = json.loads((tmp_path / "privacy" / "0.json").read_text())["booked"]
    assert [(row["server_round"], row["steps"]) for row in booked] == [(1, 4)]
    assert opened().epsilon() == ledger.epsilon() == epsilon_of([(4, 0.25, 1.0)], PRIVATE.delta)


def test_the_same_round_again_is_booked_once_and_draws_the_same(opened):
    first = opened().book(0, "start", 4).gaussian((9,))
    ledger = opened()
    assert (ledger.book(0, "start", 4).gaussian((9,)) == first).all()
    assert ledger.epsilon() == epsilon_of([(4, 0.25, 1.0)], PRIVATE.delta)


@pytest.mark.parametrize("again", [(0, "another start", "data"), (1, "start", "data"), (0, "start", "other data")])
def test_any_other_round_is_booked_anew_and_draws_others(opened, again):
    server_round, start, data = again
    first = opened().book(0, "start", 4).uniform(9)
    ledger = opened(data=data)
    assert not (ledger.book(server_round, start, 4).uniform(9) == first).any()
    assert ledger.epsilon() == epsilon_of([(8, 0.25, 1.0)], PRIVATE.delta)


def test_randomness_follows_from_no_more_than_a_secret_of_its_own(tmp_path):
    drawn = [Ledger(tmp_path / name, "0", PRIVATE, "data").book(0, "start", 4).seed() for name in "ab"]
    assert drawn[0] != drawn[1]


def test_only_its_owner_can_read_the_secret(opened, tmp_path):
    opened()
    key = tmp_path / "privacy" / "0.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.chmod(0o644)
    with refuses(RunError, "chmod 600"):
        opened()


def test_nothing_is_booked_over_the_budget(opened):
    once, twice = (epsilon_of([(steps, 0.25, 1.0)], PRIVATE.delta) for steps in (4, 8))
    ledger = opened(PRIVATE.model_copy(update={"epsilon_budget": (once + twice) / 2}))
    ledger.book(0, "start", 4)
    with refuses(FederationError, "epsilon_budget"):
        ledger.book(1, "later", 4)
    assert ledger.epsilon() == opened().epsilon() == once
    ledger.book(0, "start", 4)  # what is booked already can be done again


def test_a_ledger_without_its_secret_or_damaged_is_refused(opened, tmp_path):
    opened().book(0, "start", 4)
    key, path = tmp_path / "privacy" / "0.key", tmp_path / "privacy" / "0.json"
    secret = key.read_bytes()
    key.unlink()
    with refuses(RunError, "missing"):
        opened()
    key.write_bytes(secret[:5])
    key.chmod(0o600)
    with refuses(RunError, "5 bytes"):
        opened()
    key.write_bytes(secret)
    for text in ("", "{}", '{"booked": [{"steps": 4}]}', "[1]"):
        path.write_text(text)
        with refuses(RunError, "cannot be read"):
            opened()


def test_a_ledger_that_knows_less_than_the_run_is_refused(opened):
    ledger = opened()
    ledger.book(0, "start", 4)
    ledger.check([1])
    with refuses(RunError, "server round 2"):
        ledger.check([1, 2])


def test_a_run_over_its_budget_is_refused_before_it_begins():
    settings = ["privacy.dp.noise_multiplier=1", "privacy.dp.sampling_rate=0.25", "federation.rounds=3"]
    config = load_config(overrides=[*settings, "training.local_epochs=2"])
    planned = planned_epsilon(config, ["0", "1"])
    assert planned == epsilon_of([(24, 0.25, 1.0)], 1e-5)
    assert f"ε = {planned:.3f}" in refuse_over_budget(config, ["0", "1"])
    with refuses(ConfigError, "epsilon_budget"):
        refuse_over_budget(
            load_config(overrides=[*settings, "training.local_epochs=2", "privacy.dp.epsilon_budget=1"]), ["0", "1"]
        )


def test_who_trains_less_often_spends_less():
    settings = ["privacy.dp.noise_multiplier=1", "privacy.dp.sampling_rate=0.25", "federation.rounds=4"]
    half = load_config(overrides=[*settings, "federation.participation=0.5"])
    assert planned_epsilon(half, ["0", "1"]) < planned_epsilon(load_config(overrides=settings), ["0", "1"])
