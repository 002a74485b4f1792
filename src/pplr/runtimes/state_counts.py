"""How many of one user's vectors cross the cut in a run, and what that is worth where they are guarded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.federation.decisions import participants_of
from pplr.privacy.states import told_of_states
from pplr.runtimes.assembly import Assembly

__all__ = ["announced", "guarded_run"]


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
        models = 2 if assembly.method.personal else 1
        in_round = _drawn_at_most(assembly) if config.privacy.dp.is_on else config.training.local_epochs * models
        backward = in_round * sum(name in own for own in trained)
        passes, ranks = backward, len(trained) + 1
        if settle is not None:  # what crosses again as the same bytes tells nothing new
            moving, settled = trained[:settle], trained[settle:]
            passes = in_round * sum(name in own for own in moving) + models * any(name in own for own in settled)
            ranks = len(moving) + bool(settled) + 1
        for one, every, ranked in _of_users(assembly, name):
            longest = max(longest, one)
            most = max(most, passes * every + ranks * ranked)
            gradients = max(gradients, backward * every)
    counts = {"state": 1, "pass": longest, "run": most}
    return told_of_states(config.privacy.states, counts, None if settle is None else counts | {"run": gradients})


def announced(assembly: Assembly) -> str:
    """Say before a run what will be done to states, and what that promises, in figures."""
    return f"what crosses the cut: {guarded_run(assembly)['summary']}"


def _drawn_at_most(assembly: Assembly) -> int:
    """Count the steps of a private round: a user may be drawn in every one."""
    from pplr.recommend.private_training import private_steps

    config = assembly.config
    return private_steps(config.training.local_epochs, config.privacy.dp.sampling_rate)


def _of_users(assembly: Assembly, trainer: str) -> list[tuple[int, int, int]]:
    """Count each user's states: of the longest training pass, of an epoch, and of one validation or test."""
    passes: dict[int, list[int]] = {}
    samples = assembly.samples(trainer)
    for sample, length in zip(samples, _lengths(assembly, samples), strict=True):
        passes.setdefault(sample.user, []).append(length)
    ranked = _ranked_at_most(assembly)
    return [(max(own), sum(own), ranked) for own in passes.values()]


def _lengths(assembly: Assembly, samples: Sequence[Any]) -> list[int]:
    backbone = assembly.backbone
    if backbone.trains_on == "user":  # what is drawn of a user is not known
        return [assembly.config.backbone.max_tokens] * len(samples)
    return [backbone.length(own) for own in assembly.encode(samples)]


def _ranked_at_most(assembly: Assembly) -> int:
    """Bound the states of ranking, or measuring the loss, for one user."""
    config, backbone = assembly.config, assembly.backbone
    if isinstance(backbone, ItemVectors):
        return config.data.history_items + 1
    if isinstance(backbone, CausalLM):  # the prompt, what is written, and that again to ground it
        settings = config.evaluation
        longest = settings.max_new_tokens
        if settings.grounding == "trie":
            longest = backbone.answer_room(assembly.data.dataset.catalog) + 1
        return config.backbone.max_tokens + 2 * settings.beams * longest
    return config.backbone.max_tokens
