"""Alignment finds which state is which item where a projection alone hides it, and nothing in random states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pplr.backbones.base import Backbone
from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.config import AdapterConfig, ItemVectorsConfig, TrainingConfig
from pplr.data.interactions import Catalog
from pplr.errors import ConfigError
from pplr.privacy.audits import Attacker, make_audit
from pplr.privacy.audits.alignment import _cosines, _evened, _grouped
from pplr.privacy.observing import Observation
from pplr.privacy.replica import Replica
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import refuses
from pplr.testing.audits import Scene
from pplr.testing.tiny import tiny_decoder, tiny_tokenizer

ITEMS, USERS, HISTORY = 120, 60, 16


def attacker_of(backbone: Backbone, catalog: Catalog, popularity: torch.Tensor) -> Attacker:
    plan = CutPlan(0, 0, backbone.total_layers)
    start = CutModel(backbone, plan, AdapterConfig(rank=2), TrainingConfig()).initial_adapter(0)
    return Attacker(
        "catalog", Replica(backbone, plan, AdapterConfig(rank=2), start), catalog, popularity, lambda *_: []
    )


@pytest.fixture(scope="module")
def world() -> tuple[Attacker, list[Observation], list[list[int]]]:
    """Histories by a skewed popularity, and their states behind a projection that the attacker has not."""
    source = torch.Generator().manual_seed(0)
    text = CausalLM(tiny_decoder(width=64), tiny_tokenizer(), folder="tiny")
    backbone = ItemVectors(text, ItemVectorsConfig(width=16, hidden_width=None))
    catalog = Catalog(tuple(map(str, range(ITEMS))), tuple(f"Title {number}" for number in range(ITEMS)))
    backbone.prepare(catalog, lambda texts: torch.randn(len(texts), text.hidden_size, generator=source))
    odds = 1 / (1 + torch.arange(ITEMS).double())
    histories = [torch.multinomial(odds, HISTORY, generator=source).tolist() for _ in range(USERS)]
    popularity = torch.bincount(torch.tensor(histories).flatten(), minlength=ITEMS)
    secret = torch.randn(text.hidden_size, text.hidden_size, generator=source)
    states = [backbone.vectors[torch.tensor(own)] @ secret for own in histories]
    return attacker_of(backbone, catalog, popularity), [Observation(own, own, None) for own in states], histories


def share_right(guesses, histories) -> float:
    said = torch.tensor([own.tokens for own in guesses])
    return float((said == torch.tensor(histories)).float().mean())


def test_a_secret_projection_alone_hides_nothing(world):
    attacker, seen, histories = world
    assert share_right(make_audit("alignment").attack(seen, attacker), histories) > 0.95


def test_it_finds_nothing_in_random_states(world):
    attacker, seen, histories = world
    source = torch.Generator().manual_seed(1)
    random = [replace(own, states=torch.randn(own.states.shape, generator=source)) for own in seen]
    assert share_right(make_audit("alignment").attack(random, attacker), histories) < 0.1


def test_it_does_not_matter_in_which_order_passes_come(world):
    attacker, seen, _ = world
    forward = make_audit("alignment").attack(seen, attacker)
    assert make_audit("alignment").attack(seen[::-1], attacker) == forward[::-1]


def test_states_of_one_item_are_put_together(world):
    _, seen, histories = world
    items = torch.tensor(histories).flatten()
    states = torch.cat([own.states for own in seen])
    groups = _grouped(
        states + 0.1 * states.std() * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    )
    assert ((groups[:, None] == groups[None]) == (items[:, None] == items[None])).all()


def test_cosines_of_the_centres_stay_where_no_direction_is_evened():
    centres = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(_cosines(_evened(centres, 0.0)), _cosines(centres - centres.mean(dim=0)))


def test_a_backbone_that_reads_tokens_is_refused():
    scene = Scene("causal_lm", (0, 1))
    with refuses(ConfigError, "alignment was asked of backbone causal_lm"):
        make_audit("alignment").attack(scene.seen()[:2], scene.attacker("catalog"))
