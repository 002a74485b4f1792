"""The membership audit finds out an overtrained model, and nothing where there is nothing to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config
from pplr.progress import Silent
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.membership import MembershipSettings, audit_membership

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
    "training.local_epochs=12",
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
    assert told["members"] == told["non_members"] == (USERS if unit == "user" else len_of(told)) * 3
    assert told["loss"]["members"] < told["loss"]["non_members"]
    for attack in ("loss_difference", "offline", "online"):
        assert auc(told, "server", attack)["low"] > 0.6
    assert auc(told, "client", "online")["low"] > 0.5
    assert auc(told, "outsider", "lists")["low"] > 0.5


def len_of(told: dict[str, Any]) -> int:
    """Each user has a fifth of its five targets left out in some training: one."""
    return int(told["users"])
