"""What of a run is audited, and by whom: settings, and the words in which a person gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, cast, get_args

import numpy as np

from pplr.config import RuntimeConfig, StatePrivacyConfig
from pplr.config_files import load_config
from pplr.errors import ConfigError, nearest
from pplr.privacy.audits import PAIRS, Knowledge, make_audit

__all__ = ["AuditSettings", "AuditWords", "make_settings"]

_LEVELS = get_args(Knowledge)
_WIRES = get_args(RuntimeConfig.model_fields["wire"].annotation)


@dataclass(frozen=True)
class AuditSettings:
    """What is audited.

    Args:
        attacks: Names of attacks; when empty, all but those that take long, and those that know the noise where it is.
        knowledge: What attackers have; every level that an attack can be run at when empty.
        users: Users whose passes are attacked.
        cuts: Pairs of k and m; the run's own when empty.
        noises: Standard deviations of noise on hidden states, as multiples of theirs, over what the run does itself.
        passes: How often each pass crosses, each time with new noise; attackers look at the mean. With
            ``settle_rounds`` only as many are new as a state can cross with noise of its own: those before the input
            stage settles, validation among them, and few after.
        pairs: Passes of public text whose states an attacker at the level ``pairs`` has, one setting for each number.
        guards: What clients do to what they send; the run's own ``privacy.states`` when empty. With another one a run
            shows what that would hide, and what it costs a model that was trained without it.
        wires: How states travel; the run's own way when empty.
        ranked_users: Users whose rankings are measured where there is noise; all when absent.
        seed: Of the draws of users, auxiliary text and noise.
    """

    attacks: tuple[str, ...] = ()
    knowledge: tuple[Knowledge, ...] = ()
    users: int = 20
    cuts: tuple[tuple[int, int], ...] = ()
    noises: tuple[float, ...] = (0.0,)
    passes: tuple[int, ...] = (1,)
    pairs: tuple[int, ...] = (PAIRS,)
    guards: tuple[StatePrivacyConfig, ...] = ()
    wires: tuple[Literal["exact", "float32", "bfloat16", "int8"], ...] = ()
    ranked_users: int | None = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.attacks:
            make_audit(name)
        if self.users < 2:
            raise ConfigError(f"{self.users} users are to be audited", cure="Audit at least two, for an interval.")
        if any(not np.isfinite(noise) or noise < 0 for noise in self.noises):
            raise ConfigError(f"noise of {self.noises}", cure="Give 0 or more, as a multiple of the states' own size.")
        if any(passes < 1 for passes in self.passes):
            raise ConfigError(f"passes of {self.passes}", cure="Let each pass cross at least once.")
        if any(pairs < 2 for pairs in self.pairs):
            raise ConfigError(f"pairs of {self.pairs}", cure="Give states of two public passes at least.")


class AuditWords(TypedDict, total=False):
    """What a person may say of an audit; what is left out is as in :class:`AuditSettings`.

    Attributes:
        attacks: Names of attacks; when empty, all but those that take long.
        knowledge: What attackers have; every level that an attack can be run at when empty.
        users: Users whose passes are attacked.
        cuts: Pairs of k and m; the run's own when empty.
        noises: Standard deviations of noise on hidden states, as multiples of the states' own size.
        passes: How often each pass crosses with new noise; attackers look at the mean.
        pairs: Passes of public text whose states an attacker with ``pairs`` has.
        guards: Each a number of settings of ``privacy.states``, such as ``["clip_norm=36"]``; the run's own when empty.
        wires: How states travel; the run's own way when empty.
        seed: Of the draws of users, public text and noise.
    """

    attacks: Sequence[str]
    knowledge: Sequence[str]
    users: int
    cuts: Sequence[tuple[int, int]]
    noises: Sequence[float]
    passes: Sequence[int]
    pairs: Sequence[int]
    guards: Sequence[Sequence[str]]
    wires: Sequence[str]
    seed: int


def make_settings(**words: Unpack[AuditWords]) -> AuditSettings:
    """Check words that a person gave, and make settings of them.

    Args:
        words: See :class:`AuditWords`.

    Raises:
        ConfigError: One of them is unknown.
    """
    levels, wires = words.get("knowledge", ()), words.get("wires", ())
    for word, known, what in (
        *((own, _LEVELS, "knowledge") for own in levels),
        *((own, _WIRES, "wire format") for own in wires),
    ):
        if word not in known:
            raise ConfigError(f"no {what} is called {word!r}", cure=nearest(str(word), [str(own) for own in known]))
    return AuditSettings(
        attacks=tuple(words.get("attacks", ())),
        knowledge=tuple(cast(Knowledge, own) for own in levels),
        users=words.get("users", AuditSettings.users),
        cuts=tuple(words.get("cuts", ())),
        noises=tuple(words.get("noises", AuditSettings.noises)),
        passes=tuple(words.get("passes", AuditSettings.passes)),
        pairs=tuple(words.get("pairs", AuditSettings.pairs)),
        guards=tuple(_guard_of(told) for told in words.get("guards", ())),
        wires=cast(Any, tuple(wires)),
        seed=words.get("seed", AuditSettings.seed),
    )


def _guard_of(told: Sequence[str]) -> StatePrivacyConfig:
    """Read settings of ``privacy.states``, whatever backbone they are for."""
    overrides = ["backbone.name=item_vectors", *(f"privacy.states.{own}" for own in told)]
    return load_config(overrides=overrides).privacy.states
