"""What is said to cross of one user is at least what does, counted where it is guarded."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest

from pplr.privacy.states import StateGuard
from pplr.runtimes.in_process import train
from pplr.runtimes.state_counts import draws_of_a_state
from pplr.stages.client_model import ClientModel
from tests.runtimes.test_item_vector_runs import config  # noqa: F401

STATES = ("privacy.states.clip_norm=2", "privacy.states.noise=gaussian", "privacy.states.noise_multiplier=0.1")
PRIVATE = (
    "privacy.dp.noise_multiplier=1",
    "privacy.dp.sampling_rate=1.0",
    "privacy.dp.users_per_step=8",
    "data.catalog=all",
    "data.item_core=1",
    "training.samples=null",
    "federation.patience=null",
    "federation.heating_scale=null",
    "federation.weighting=uniform",
)
MANY = ("data.holdout.kind=user_ratio", "data.holdout.ratios=[0.4, 0.5, 0.1]")


@pytest.fixture
def crossed(monkeypatch):
    """Count each user's vectors and gradients as they go through a guard; users of a pass are told by its batch."""
    states, gradients, first = Counter(), Counter(), {}
    under = []

    def by_owner(counts, lengths):
        for owner, length in zip(under[-1].owners.tolist(), lengths.tolist(), strict=True):
            counts[owner] += length

    for name in ("train_loss", "hidden_states"):
        real = getattr(ClientModel, name)

        def keeping(self, batch, *arguments, real=real, **options):
            under.append(batch)
            return real(self, batch, *arguments, **options)

        monkeypatch.setattr(ClientModel, name, keeping)
    guarded, sent_back, repeating = StateGuard.states, StateGuard.gradient, StateGuard.repeating
    again = []

    def counting(self, hidden_states, lengths=None, *, public=False):
        made = guarded(self, hidden_states, lengths, public=public)
        if not public and again:
            states[again[-1]] += hidden_states.shape[1]
            first.setdefault(again[-1], set()).add(made[0, 0].numpy().tobytes())
        elif not public:
            by_owner(states, lengths)
        return made

    def counting_back(self, gradient, lengths, scale):
        by_owner(gradients, lengths)
        return sent_back(self, gradient, lengths, scale)

    @contextmanager
    def noting(self, owner):
        again.append(owner)
        with repeating(self, owner):
            yield
        again.pop()

    monkeypatch.setattr(StateGuard, "states", counting)
    monkeypatch.setattr(StateGuard, "gradient", counting_back)
    monkeypatch.setattr(StateGuard, "repeating", noting)
    return states, gradients, first


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("evaluation.before=true",),
        (*MANY, "evaluation.validation_metric=loss"),
        (*PRIVATE, "federation.method=ditto", "training.local_epochs=2"),
        ("federation.method=ditto", "training.local_epochs=2", "evaluation.before=true"),
        ("federation.method=centralized", *MANY, "evaluation.validation_metric=loss", "evaluation.before=true"),
    ],
    ids=["plain", "before", "loss", "private ditto", "ditto", "pooled"],
)
def test_no_user_sends_more_than_is_counted_and_one_sends_as_much(tmp_path, config, crossed, settings):  # noqa: F811
    run = train(config(*STATES, "evaluation.test_users=24", *settings), tmp_path / "run")
    states, gradients, _ = crossed
    counted = run.metrics["states"]["vectors"]["run"]
    assert max(states.values()) <= counted
    assert max(states.values()) == counted
    assert 0 < max(gradients.values()) <= counted


SETTLED = ("privacy.states.settle_rounds=0", "data.history_items=10", "evaluation.test_users=24")


def test_train_validation_and_test_of_a_settled_history_show_one_noise(tmp_path, config, crossed):  # noqa: F811
    """Nobody's history is longer than is read, so each user's first state crosses with one noise, however often."""
    settings = (*STATES, *SETTLED, "training.local_epochs=2", "evaluation.validation_users=null")
    run = train(config(*settings), tmp_path / "run")
    states, _, first = crossed
    assert len(first) == 24
    assert {len(own) for own in first.values()} == {1}
    assert min(states.values()) > 4 * 3
    assert draws_of_a_state(run.assembly(), 0) == 1


@pytest.mark.parametrize("settings", [("data.history_items=3",), ("evaluation.before=true", "federation.method=ditto")])
def test_no_state_crosses_with_more_noises_than_an_audit_looks_at(tmp_path, config, crossed, settings):  # noqa: F811
    own = (*STATES, *SETTLED, "privacy.states.settle_rounds=1", "training.local_epochs=2", *settings)
    run = train(config(*own), tmp_path / "run")
    _, _, first = crossed
    moving = 1 * (2 * (2 if run.config.federation.method == "ditto" else 1) + 1)
    assert moving + max(len(kinds) for kinds in first.values()) <= draws_of_a_state(run.assembly(), 1)
    assert max(len(kinds) for kinds in first.values()) > 1
