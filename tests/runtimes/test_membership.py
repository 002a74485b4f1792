"""The membership audit finds out an overtrained model, and nothing where there is nothing to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config
from pplr.errors import ConfigError
from pplr.privacy.audits.membership_units import draw_halves
from pplr.progress import Silent
from pplr.runtimes import membership
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.membership import MembershipSettings, audit_membership
from pplr.testing import refuses

USERS, ITEMS, TAKEN = 32, 60, 8
OVERTRAINED = (
    "backbone.name=item_vectors",
    "backbone.item_vectors.width=32",
    "backbone.item_vectors.hidden_width=null",
    "backbone.item_vectors.residuals=mixed",
    "backbone.item_vectors.whitening=none",
    "data.partition.by=random",
    "data.partition.column=null",
    "training.samples=null",
    "training.local_epochs=8",
    "training.learning_rate=0.01",
    "training.ends_rate=4",
    "adapter.dropout=0",
    "federation.clients=2",
)


@pytest.fixture(scope="module")
def random_walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who take items at random, so that nothing but their own training tells of them."""
    folder = tmp_path_factory.mktemp("walks") / "tiny"
    folder.mkdir()
    items = "".join(f"t{number}\tItem {number}\n" for number in range(ITEMS))
    (folder / "tiny.item").write_text("item_id:token\titem_name:token_seq\n" + items)
    (folder / "tiny.user").write_text("user_id:token\n" + "".join(f"u{user}\n" for user in range(USERS)))
    lines = ["user_id:token\titem_id:token\ttimestamp:float\n"]
    source = np.random.default_rng(0)
    for user in range(USERS):
        for place, item in enumerate(source.permutation(ITEMS)[:TAKEN].tolist()):
            lines.append(f"u{user}\tt{item}\t{1000 * user + place}\n")
    (folder / "tiny.inter").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def audited(
    small_config: Callable[..., Config], random_walks: Path, model_folder: Path, backbone: CausalLM
) -> Callable[..., dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def get(*settings: str, **options: Any) -> dict[str, Any]:
        key = (settings, tuple(sorted(options.items())))
        if key not in found:
            own = [*OVERTRAINED, f"data.path={random_walks}", f"backbone.model={model_folder}", *settings]
            assembly = Assembly(small_config(*own), Silent())
            found[key] = audit_membership(assembly, MembershipSettings(**options))
        return found[key]

    return get


def auc(content: dict[str, Any], attacker: str, attack: str) -> dict[str, float]:
    (own,) = [own for own in content["attacks"] if (own["attacker"], own["attack"]) == (attacker, attack)]
    return dict(own["auc"])


@pytest.mark.parametrize("unit", ["user", "interaction"])
def test_an_overtrained_model_is_found_out(audited: Callable[..., dict[str, Any]], unit: str) -> None:
    told = audited(unit=unit)
    assert told["members"] == told["non_members"] == 3 * USERS  # each has one of its five targets tried
    assert told["loss"]["members"] < told["loss"]["non_members"]
    for attack in ("loss_difference", "offline", "online"):
        assert auc(told, "server", attack)["low"] > 0.6
    assert auc(told, "client", "online")["low"] > 0.5
    assert auc(told, "outsider", "lists")["low"] > 0.5


def test_an_adapter_that_was_never_trained_tells_nothing(audited: Callable[..., dict[str, Any]]) -> None:
    told = audited("training.learning_rate=1e-30", "federation.rounds=1", "training.local_epochs=1")
    for own in told["attacks"]:
        assert own["auc"] == {"value": 0.5, "low": 0.5, "high": 0.5}
        assert own["tpr@0.01"] is None  # 96 non-members


def test_names_dealt_at_random_are_not_found(
    audited: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same overtrained adapters, of which it is said at random who was in."""
    trained = membership._samples
    others = iter(draw_halves(["all"] * USERS, 3, seed=99))
    monkeypatch.setattr(membership, "_samples", lambda assembly, units, _: trained(assembly, units, next(others)))
    told = audited(seed=3)
    for own in told["attacks"]:
        assert own["auc"]["low"] <= 0.5 <= own["auc"]["high"]


@pytest.mark.slow
def test_without_an_exchange_another_client_learns_nothing(audited: Callable[..., dict[str, Any]]) -> None:
    told = audited("federation.method=local")
    assert auc(told, "server", "online")["low"] > 0.6
    for attack in ("loss_difference", "offline", "online"):
        found = auc(told, "client", attack)
        assert found["low"] <= 0.5 <= found["high"]


@pytest.mark.slow
def test_private_training_is_not_found_out(audited: Callable[..., dict[str, Any]]) -> None:
    private = (
        "data.catalog=all",
        "federation.patience=null",
        "federation.heating_scale=null",
        "privacy.dp.sampling_rate=0.5",
        "privacy.dp.users_per_step=4",
    )
    noisy = audited(*private, "privacy.dp.noise_multiplier=8", "training.local_epochs=2")
    assert noisy["private"]
    found = auc(noisy, "server", "online")
    assert found["low"] <= 0.55
    assert found["high"] < auc(audited(unit="user"), "server", "online")["low"]


@pytest.mark.slow
def test_pooled_data_have_one_adapter_and_no_other_client(audited: Callable[..., dict[str, Any]]) -> None:
    told = audited("federation.method=centralized")
    assert {own["attacker"] for own in told["attacks"]} == {"server", "outsider"}
    assert auc(told, "server", "online")["low"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("backbone.name=causal_lm", "training.samples=40"),
        (
            "backbone.name=encoder",
            "backbone.model=ENCODER",
            "backbone.max_tokens=128",
            "adapter.target_modules=[query]",
        ),
    ],
)
def test_other_backbones_are_audited_too(
    audited: Callable[..., dict[str, Any]], settings: tuple[str, ...], encoder_folder: Path
) -> None:
    settings = tuple(own.replace("ENCODER", str(encoder_folder)) for own in settings)
    told = audited(*settings, "training.local_epochs=1", "federation.rounds=1", lists=1)
    assert told["backbone"] == settings[0].removeprefix("backbone.name=")
    assert {own["attacker"] for own in told["attacks"]} == {"server", "client", "outsider"}
    assert told["loss"]["members"] < told["loss"]["base"]


def test_who_is_left_out_has_no_part_in_the_training(
    small_config: Callable[..., Config], random_walks: Path, model_folder: Path
) -> None:
    config = small_config(*OVERTRAINED, f"data.path={random_walks}", f"backbone.model={model_folder}")
    assembly = Assembly(config, Silent())
    for unit in ("user", "interaction"):
        units = membership._units(assembly, MembershipSettings(unit=unit))
        (is_in, *_) = draw_halves([own.client for own in units], 3, seed=0)
        kept = [own for samples in membership._samples(assembly, units, is_in).values() for own in samples]
        taken = {(own.user, item) for own in kept for item in (*own.history, own.target)}
        users = {user for user, _ in taken}
        for own, known in zip(units, is_in, strict=True):
            assert ((own.user in users) if own.item is None else ((own.user, own.item) in taken)) == known


def test_what_cannot_be_audited_is_refused(audited: Callable[..., dict[str, Any]]) -> None:
    with refuses(ConfigError, "2 pairs of trainings"):
        MembershipSettings(pairs=2)
    with refuses(ConfigError, "lists of no items"):
        MembershipSettings(lists=0)
    with refuses(ConfigError, "no user has 5 training targets"):
        audited("training.samples=8", "data.history_items=2", unit="interaction")
