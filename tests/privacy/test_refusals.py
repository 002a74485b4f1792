"""Whatever would make ε a lie is refused, with what to do."""

from __future__ import annotations

import pytest

from pplr.config_files import load_config
from pplr.errors import ConfigError
from pplr.privacy.refusals import refuse_lies
from pplr.testing import refuses

HONEST = (
    "privacy.dp.noise_multiplier=1",
    "data.catalog=all",
    "federation.patience=null",
    "federation.heating_scale=null",
)
LIES = [
    ("runtime.name=flower", "runtime.name"),
    ("runtime.name=flower_simulation", "runtime.name"),
    ("federation.patience=3", "federation.patience"),
    ("federation.heating_scale=0.7", "federation.heating_scale"),
    ("federation.method=pplr_weighted", "federation.method: pplr"),
    ("federation.method=fedavg", "federation.weighting"),
    ("federation.method=fedprox", "federation.weighting"),
    ("federation.method=ditto", "federation.weighting"),
    ("training.samples=100", "training.samples"),
    ("data.catalog=taken", "data.catalog"),
    ("data.item_core=2", "data.item_core"),
    ("data.holdout.kind=global_time", "data.holdout.kind"),
    ("data.holdout.kind=unseen_items", "data.holdout.kind"),
    ("data.holdout.kind=new_users", "data.holdout.kind"),
]


@pytest.mark.parametrize(("setting", "words"), LIES, ids=[lie[0] for lie in LIES])
def test_a_lie_is_refused_only_where_training_is_private(setting, words):
    with refuses(ConfigError, words):
        refuse_lies(load_config(overrides=[*HONEST, setting]), hosted_elsewhere=False)
    off = "privacy.dp.noise_multiplier=null"
    refuse_lies(load_config(overrides=[*HONEST, setting, off]), hosted_elsewhere=False)


def test_phases_are_chosen_by_validation():
    settings = [*HONEST, "backbone.encoder.first_phase_rounds=2"]
    refuse_lies(load_config(overrides=settings), hosted_elsewhere=False)  # another backbone has none
    with refuses(ConfigError, "first_phase_rounds"):
        refuse_lies(load_config(overrides=[*settings, "backbone.name=encoder"]), hosted_elsewhere=False)


def test_a_stage_server_needs_a_frozen_middle():
    with refuses(ConfigError, "freeze_middle"):
        refuse_lies(load_config(overrides=HONEST), hosted_elsewhere=True)
    frozen = [*HONEST, "privacy.dp.freeze_middle=true", "federation.weighting=uniform"]
    refuse_lies(load_config(overrides=frozen), hosted_elsewhere=True)
    with refuses(ConfigError, "ditto"):
        refuse_lies(load_config(overrides=[*frozen, "federation.method=ditto"]), hosted_elsewhere=True)


@pytest.mark.parametrize("method", ["pplr", "fedavg", "fedprox", "ditto", "local", "centralized"])
def test_every_other_method_can_be_private(method):
    settings = [*HONEST, f"federation.method={method}", "federation.weighting=uniform"]
    refuse_lies(load_config(overrides=settings), hosted_elsewhere=False)
