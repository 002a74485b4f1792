"""How many of one user's vectors cross the cut in a run, and what that is worth where they are guarded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.data.prompts import Case, Sample
from pplr.federation.decisions import participants_of
from pplr.privacy.states import told_of_states
from pplr.runtimes.assembly import POOLED, Assembly

__all__ = ["announced", "draws_of_a_state", "guarded_run"]

_REREAD = 3
"""Tokens that one written token may be when its text is read again: a byte that is no letter is shown as three."""


def guarded_run(assembly: Assembly, records: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Say what the guard of a run's states promises of one of them, of the longest training pass, and of the run.

    The run is that of the user with most states, in training, in validation after every round and in the test. Where
    the exact number depends on what is drawn or generated, the most that it can be is counted.

    Args:
        assembly: The run.
        records: Of the rounds that were carried out; those that are planned when absent.
    """
    config = assembly.config
    if records is None:
        numbers: Iterable[int] = range(config.federation.rounds)
        trained = [set(participants_of(assembly.trainers, number, config)) for number in numbers]
    else:
        trained = [{name for name, own in record["clients"].items() if own["samples"] != 0} for record in records]
    longest = most = gradients = 0
    settle = config.privacy.states.settle_rounds
    for name in assembly.trainers:
        in_round, models = _passes_of_a_round(assembly), _models(assembly)
        backward = in_round * sum(name in own for own in trained)
        passes, validations = backward, len(trained)
        if settle is not None:  # what crosses again as the same bytes tells nothing new
            moving, settled = trained[:settle], trained[settle:]
            passes = in_round * sum(name in own for own in moving) + models * any(name in own for own in settled)
            validations = len(moving) + bool(settled)
        for user in _users(assembly, name).values():
            longest = max(longest, user.longest)
            most = max(most, passes * user.epoch + validations * user.validation + user.test)
            gradients = max(gradients, backward * user.epoch)
    counts = {"state": 1, "pass": longest, "run": most}
    return told_of_states(config.privacy.states, counts, None if settle is None else counts | {"run": gradients})


def draws_of_a_state(assembly: Assembly, settle_rounds: int) -> int:
    """Count how often at most one item of a history crosses with noise of its own, where the input stage settles.

    Before it does that is in every pass: of training, and of each round's validation. Afterwards histories that begin
    alike have the same noise as far as they are alike, so only another input stage brings more, or a history of which
    the oldest items are left out, as its window moves on from training to validation and to the test.

    Args:
        assembly: The run.
        settle_rounds: After how many server rounds.
    """
    config = assembly.config
    moving = min(settle_rounds, config.federation.rounds)
    validated = max(user.validation_passes for name in assembly.trainers for user in _users(assembly, name).values())
    longest = max(map(len, assembly.data.dataset.histories))
    divided = longest > config.data.history_items  # then two windows of training share the item at their border
    in_round = _passes_of_a_round(assembly) * (2 if divided else 1)
    windows = 4 if divided else 1
    best_before = moving > 1  # the best round's input stage may be an earlier one
    settled = _models(assembly) * windows + best_before + config.evaluation.before
    return moving * (in_round + validated) + settled


def announced(assembly: Assembly) -> str:
    """Say before a run what will be done to states, and what that promises, in figures."""
    return f"what crosses the cut: {guarded_run(assembly)['summary']}"


@dataclass
class _User:
    """How many states of one user cross.

    Args:
        longest: In the longest training pass.
        epoch: In an epoch.
        validation: In one validation.
        validation_passes: Passes of one validation.
        test: In the test, of the initial adapter too where that is measured.
    """

    longest: int = 0
    epoch: int = 0
    validation: int = 0
    validation_passes: int = 0
    test: int = 0


def _models(assembly: Assembly) -> int:
    """Count a client's models that read its histories: the exchanged one, and a personal one where there is one."""
    return 2 if assembly.method.personal else 1


def _passes_of_a_round(assembly: Assembly) -> int:
    """Count how often at most a sample crosses in a round of training; in a private step a user may be drawn or not."""
    config = assembly.config
    if not config.privacy.dp.is_on:
        return config.training.local_epochs * _models(assembly)
    from pplr.recommend.private_training import private_steps

    own = private_steps(config.training.local_epochs, config.privacy.dp.sampling_rate)
    return own + (config.training.local_epochs if assembly.method.personal else 0)


def _users(assembly: Assembly, trainer: str) -> dict[int, _User]:
    """Count the states of each user of one who trains."""
    users: defaultdict[int, _User] = defaultdict(_User)
    samples = assembly.samples(trainer)
    for sample, length in zip(samples, _lengths(assembly, samples), strict=True):
        own = users[sample.user]
        own.longest, own.epoch = max(own.longest, length), own.epoch + length
    validation = assembly.validation_samples(trainer)
    if assembly.config.evaluation.validation_metric == "loss":
        for sample, encoded in zip(validation, assembly.encode(validation), strict=True):
            users[sample.user].validation += assembly.backbone.length(encoded)
            users[sample.user].validation_passes += 1
    else:
        for case in assembly.validation_cases(trainer):
            users[case.user].validation += _ranked_at_most(assembly, case)
            users[case.user].validation_passes += 1
    tests = 2 if assembly.config.evaluation.before else 1
    for name, cases in assembly.data.test.items():
        for case in cases if trainer in (POOLED, name) else ():
            users[case.user].test += tests * _ranked_at_most(assembly, case)
    return users


def _lengths(assembly: Assembly, samples: Sequence[Sample]) -> list[int]:
    backbone = assembly.backbone
    if backbone.trains_on == "user":  # what is drawn of a user is not known
        return [assembly.config.backbone.max_tokens] * len(samples)
    return [backbone.length(own) for own in assembly.encode(samples)]


def _ranked_at_most(assembly: Assembly, case: Case) -> int:
    """Bound the states of ranking for one user."""
    config, backbone = assembly.config, assembly.backbone
    if isinstance(backbone, ItemVectors):
        return len(case.history[-config.data.history_items :])
    if isinstance(backbone, CausalLM):
        settings = config.evaluation
        if settings.grounding == "trie":  # the prompt, and what is written
            longest = backbone.answer_room(assembly.data.dataset.catalog) + 1
            return config.backbone.max_tokens + settings.beams * longest
        grounded = len(backbone.text_tokens("")) + _REREAD * settings.max_new_tokens
        return config.backbone.max_tokens + settings.beams * settings.max_new_tokens + grounded
    return config.backbone.max_tokens
