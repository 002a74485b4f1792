"""Each attack keeps the contract: it finds what is bare, and nothing in random states."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from pplr.config import StatePrivacyConfig
from pplr.privacy.audits import Guess, inverter, label_gradients, make_audit
from pplr.privacy.observing import Observation
from pplr.privacy.shortlist import Shortlist
from pplr.privacy.states import StateGuard
from pplr.testing.audits import AuditContract, Scene


@pytest.fixture(autouse=True, scope="module")
def _train_each_inverter_once():
    """The same passes give the same network, so what several tests ask for is trained once."""
    trained, known = inverter._trained, {}

    def once(passes, choices, seed, device):
        content = hashlib.sha256()
        for tokens, states in passes:
            content.update(tokens.numpy().tobytes() + states.contiguous().numpy().tobytes())
        key = (content.hexdigest(), choices, seed, inverter._EPOCHS)
        if key not in known:
            known[key] = trained(passes, choices, seed, device)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverter, "_trained", once)
        yield


class TestNearestEmbedding(AuditContract):
    audit = "nearest_embedding"
    finds: ClassVar = {"causal_lm": 1.0, "lists": 1.0, "item_vectors": 1.0}


class TestLogitLens(AuditContract):
    """States that have been moved until they predict each next token, which an untrained model's do not."""

    audit = "logit_lens"
    levels = ("own",)
    finds: ClassVar = {"causal_lm": 0.9, "lists": 0.9, "item_vectors": 0.625}  # all but the first of each: (T - 1) / T

    def seen(self, scene: Scene) -> list[Observation]:
        return scene.foreseeing


class TestVocabularyMatching(AuditContract):
    audit = "vocabulary_matching"
    finds: ClassVar = {"causal_lm": 1.0, "lists": 1.0, "item_vectors": 1.0}


class TestVocabularyMatchingBehindBlocks(AuditContract):
    audit = "vocabulary_matching"
    cut = (2, 0)
    levels = ("own",)
    finds: ClassVar = {"causal_lm": 0.9, "lists": 0.9, "item_vectors": 0.9}


class TestPairsBehindBlocks(AuditContract):
    audit = "vocabulary_matching"
    cut = (2, 0)
    levels = ("pairs",)
    finds: ClassVar = {"causal_lm": 0.25, "lists": 0.25, "item_vectors": 0.25}


class TestPairsRegression(AuditContract):
    audit = "pairs_regression"
    finds: ClassVar = {"item_vectors": 0.95}
    levels = ("pairs",)


class TestPairsRegressionBehindABlock(AuditContract):
    audit = "pairs_regression"
    cut = (1, 1)
    finds: ClassVar = {"item_vectors": 0.4}
    levels = ("pairs",)


def test_more_pairs_tell_more_and_regression_needs_fewer_than_matching():
    scene = Scene("item_vectors", (0, 1))

    def found(name, pairs):
        attacker = replace(scene.attacker("pairs"), pairs=pairs)
        return scene.mean(make_audit(name).attack(scene.seen(), attacker), "token_recovery")

    few, many = (found("pairs_regression", pairs) for pairs in (8, 256))
    assert found("vocabulary_matching", 8) < few <= many
    assert found("vocabulary_matching", 8) < found("vocabulary_matching", 256)


def test_where_nothing_is_sure_the_whole_catalog_is_tried(monkeypatch):
    """A shortlist that puts the right item last costs time and finds it all the same."""
    monkeypatch.setattr("pplr.privacy.replica._TIERS", (2, 4))
    monkeypatch.setattr("pplr.privacy.audits.vocabulary_matching._SHORT", 4)
    ranked = Shortlist.of

    def misled(self, states):
        own = ranked(self, states)
        return lambda position, candidates, count: own(position, candidates, len(candidates)).flip(0)[:count]

    monkeypatch.setattr(Shortlist, "of", misled)
    scene = Scene("item_vectors", (1, 1))
    guesses = make_audit("vocabulary_matching").attack(scene.seen(), scene.attacker("own"))
    assert scene.mean(guesses, "token_recovery") == 1.0


class TestPosteriorMatching(AuditContract):
    audit = "posterior_matching"
    finds: ClassVar = {"item_vectors": 1.0}
    levels = ("own",)


class TestPosteriorMatchingBehindBlocks(AuditContract):
    audit = "posterior_matching"
    cut = (1, 1)
    levels = ("own",)
    finds: ClassVar = {"item_vectors": 0.5}


class TestCatalogMatching(AuditContract):
    audit = "catalog_matching"
    finds: ClassVar = {"causal_lm": 1.0, "lists": 1.0, "item_vectors": 1.0}


class TestCatalogMatchingBehindBlocks(AuditContract):
    audit = "catalog_matching"
    cut = (2, 0)
    finds: ClassVar = {"causal_lm": 0.9, "lists": 0.9, "item_vectors": 0.9}


class TestInverter(AuditContract):
    audit = "inverter"
    finds: ClassVar = {"causal_lm": 0.95, "lists": 0.95, "item_vectors": 0.95}


class TestInverterBehindBlocks(AuditContract):
    audit = "inverter"
    cut = (2, 1)
    levels = ("pairs",)
    finds: ClassVar = {"item_vectors": 0.4}


class TestLabelGradients(AuditContract):
    audit = "label_gradients"
    metric = "target_hit@1"
    cut = (0, 0)
    finds: ClassVar = {"causal_lm": 0.9, "lists": 0.9, "item_vectors": 0.9}


class TestLabelGradientsOfEveryPosition(AuditContract):
    audit = "label_gradients"
    cut = (0, 0)
    levels = ("own",)
    finds: ClassVar = {"item_vectors": 0.625}  # all but the first of each: (T - 1) / T


class TestLabelGradientsBehindABlock(AuditContract):
    audit = "label_gradients"
    metric = "target_hit@1"
    cut = (0, 1)
    finds: ClassVar = {"causal_lm": 0.9, "lists": 0.9, "item_vectors": 0.9}


class TestLabelGradientsBehindBlocks(AuditContract):
    audit = "label_gradients"
    metric = "target_hit@1"
    cut = (1, 2)
    finds: ClassVar = {"causal_lm": 0.9, "lists": 0.9, "item_vectors": 0.9}


class _Predicting(AuditContract):
    __test__ = False
    audit = "label_lens"
    metric = "target_hit@1"
    draws = 4
    finds: ClassVar = {"causal_lm": 0.9, "lists": 0.9, "item_vectors": 0.9}

    def seen(self, scene: Scene) -> list[Observation]:
        return scene.predicting


class TestLabelLens(_Predicting):
    __test__ = True
    cut = (0, 0)


class TestLabelLensBehindABlock(_Predicting):
    __test__ = True
    cut = (0, 1)


@pytest.mark.parametrize(
    "config",
    [
        StatePrivacyConfig(clip_norm=1.0, noise="gaussian", noise_multiplier=0.4),
        StatePrivacyConfig(clip_norm=1.0, noise="metric", eta=16.0),
    ],
    ids=["gaussian", "metric"],
)
def test_the_mean_of_many_passes_tells_more_than_one(config):
    scene = Scene("item_vectors", (0, 1))
    attacker = scene.attacker("own", StateGuard(config, bytes(32), "attacker"))
    found = []
    for passes in (1, 64):
        seen = scene.seen(StateGuard(config, bytes(32), "client"), passes)
        found.append(scene.mean(make_audit("vocabulary_matching").attack(seen, attacker), "token_recovery"))
    assert found[0] < 0.7
    assert found[1] > found[0] + 0.2


@pytest.mark.parametrize("strength", [0.001, 0.4, 4.0])
def test_matching_by_the_posterior_finds_less_the_more_noise_there_is(strength):
    config = StatePrivacyConfig(clip_norm=1.0, noise="gaussian", noise_multiplier=strength)
    scene = Scene("item_vectors", (0, 1))
    audit, attacker = make_audit("posterior_matching"), scene.attacker("own", StateGuard(config, bytes(32), "attacker"))
    attacker = replace(attacker, popularity=torch.ones_like(attacker.popularity))  # as users draw items here
    seen = scene.seen(StateGuard(config, bytes(32), "client"))
    found = scene.mean(audit.attack(seen, attacker), "token_recovery")
    low, high = {0.001: (1.0, 1.0), 0.4: (0.1, 0.9), 4.0: (0.0, 0.2)}[strength]
    assert low <= found <= high
    if strength == 0.4:  # no item is named twice
        nearest = make_audit("vocabulary_matching").attack(seen, attacker)
        assert found >= scene.mean(nearest, "token_recovery")


class _Moving(Scene):
    """The same with the client's input stage as it is a round later."""

    def __init__(self) -> None:
        super().__init__("item_vectors", (0, 1))
        source = torch.Generator().manual_seed(11)
        self.adapter = {
            name: own + 0.05 * own.abs().mean() * torch.randn(own.shape, generator=source)
            for name, own in self.adapter.items()
        }


def test_one_noise_for_two_states_tells_their_difference_which_tells_the_items():
    """Why noise follows from the states and not from the items: an input stage moves from round to round."""
    before, after = Scene("item_vectors", (0, 1)), _Moving()
    noise = [torch.randn(own.length, 64, generator=torch.Generator().manual_seed(5)) for own in before.seen()]
    width = before.seen()[0].states.shape[1]
    sent = [
        [own.states + 100 * draw[:, :width] for own, draw in zip(scene.seen(), noise, strict=True)]
        for scene in (before, after)
    ]
    vocabulary = torch.arange(len(before.catalog))[:, None]
    first, last = (scene.replica().states(vocabulary)[:, 0] for scene in (before, after))

    def found(states: list[torch.Tensor], expected: torch.Tensor) -> float:
        guesses = [Guess(tuple(torch.cdist(own, expected).argmin(dim=-1).tolist())) for own in states]
        return before.mean(guesses, "token_recovery")

    assert found(sent[1], last) < 0.2
    differences = [later - earlier for earlier, later in zip(*sent, strict=True)]
    assert found(differences, last - first) > 0.9
    config = StatePrivacyConfig(noise="metric", eta=1.0, settle_rounds=1)
    guard = StateGuard(config, bytes(32), "client")
    with guard.repeating(7):
        own, again, moved = (guard.states(scene.seen()[0].states[None]) for scene in (before, before, after))
    assert torch.equal(own, again)
    kept = moved - own - (after.seen()[0].states - before.seen()[0].states)
    assert kept.abs().min() > 1e-3  # two noises


def test_a_clip_alone_hides_nothing_from_who_clips_candidates_too():
    config = StatePrivacyConfig(clip_norm=0.01)
    scene = Scene("item_vectors", (1, 1))
    guard = StateGuard(config, b"", "client")
    blind = make_audit("vocabulary_matching").attack(scene.seen(guard), scene.attacker("own"))
    knowing = make_audit("vocabulary_matching").attack(scene.seen(guard), scene.attacker("own", guard))
    assert scene.mean(knowing, "token_recovery") > 0.9
    assert scene.mean(blind, "token_recovery") < scene.mean(knowing, "token_recovery")


def test_noise_on_gradients_hides_the_target_and_many_passes_bring_it_back():
    config = StatePrivacyConfig(gradient_clip_norm=0.1, gradient_noise_multiplier=2.0)
    scene = Scene("item_vectors", (0, 0))
    found = []
    for passes in (1, 512):
        seen = scene.seen(StateGuard(config, bytes(32), "client"), passes)
        found.append(scene.mean(make_audit("label_gradients").attack(seen, scene.attacker("own")), "target_hit@1"))
    assert found[0] < 0.5 < found[1]


@pytest.mark.parametrize("name", ["causal_lm", "lists"])
def test_clipping_each_tokens_gradient_hides_no_target_from_who_clips_candidates_too(name, monkeypatch):
    best = []
    ranked = label_gradients._cosines

    def kept(candidates, seen, *places):
        best.append(float(ranked(candidates, seen, *places).max()))
        return ranked(candidates, seen, *places)

    monkeypatch.setattr(label_gradients, "_cosines", kept)
    scene = Scene(name, (0, 1))
    guard = StateGuard(StatePrivacyConfig(gradient_clip_norm=1e-3), b"", "client")
    seen = scene.seen(guard)
    assert seen[0].gradient.norm(dim=-1).max() <= 1.001e-3
    knowing = scene.mean(make_audit("label_gradients").attack(seen, scene.attacker("own", guard)), "target_hit@1")
    assert knowing == 1.0
    assert min(best) > 0.9999
    best.clear()
    make_audit("label_gradients").attack(seen, scene.attacker("own"))
    assert min(best) < 0.99  # lengths that the clip has made alike, which this attacker does not


@pytest.mark.parametrize("rows", [1, 3])
def test_what_came_before_is_run_once_and_changes_nothing(rows):
    scene = Scene("causal_lm", (0, 2))
    own, replica = scene.seen()[0].returned, scene.replica()
    with torch.no_grad():
        whole = replica.leave(own[None])[0, -5:]
        parts = replica.leave(own[None, -5:].expand(rows, -1, -1), own[:-5])
    torch.testing.assert_close(parts, whole.expand(rows, -1, -1))


@pytest.mark.parametrize("name", ["causal_lm", "lists", "item_vectors"])
@pytest.mark.parametrize("last", [0, 2])
def test_a_candidate_gradient_is_the_one_that_a_client_would_send(name, last, monkeypatch):
    best = []
    ranked = label_gradients._cosines

    def kept(candidates, seen, *places):
        best.append(float(ranked(candidates, seen, *places).max()))
        return ranked(candidates, seen, *places)

    monkeypatch.setattr(label_gradients, "_cosines", kept)
    scene = Scene(name, (0, last))
    make_audit("label_gradients").attack(scene.seen()[:1], scene.attacker("own"))
    assert max(best) > 0.9999


def test_titles_are_chosen_by_norm_and_head_before_they_are_taken_through_blocks(monkeypatch):
    monkeypatch.setattr(label_gradients, "_SHORT", 10)
    scene = Scene("causal_lm", (0, 1))
    guesses = make_audit("label_gradients").attack(scene.seen(), scene.attacker("own"))
    assert scene.mean(guesses, "target_hit@1") >= 0.9


def test_no_gradient_no_guess():
    scene = Scene("item_vectors", (0, 1))
    (own, *_) = scene.seen()
    blind = Observation(own.states, own.returned, None)
    assert make_audit("label_gradients").attack([blind], scene.attacker("own"))[0].targets is None


def test_training_an_inverter_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(inverter, "_EPOCHS", 1)
    scene = Scene("item_vectors", (0, 1))
    seen, attacker = scene.seen(), scene.attacker("own")
    before = torch.random.get_rng_state()
    make_audit("inverter").attack(seen, attacker)
    assert torch.equal(before, torch.random.get_rng_state())
