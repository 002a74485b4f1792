"""What an attack is: what it is given, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from pplr.backbones.item_vectors import ItemVectors
from pplr.data.interactions import Catalog
from pplr.errors import ConfigError, nearest
from pplr.privacy.observing import Observation
from pplr.privacy.replica import Replica
from pplr.privacy.shortlist import Shortlist

__all__ = ["AUDITS", "PAIRS", "Attacker", "Audit", "Guess", "Knowledge", "make_audit", "register"]

Knowledge = Literal["own", "exchanged", "mixed", "base", "pairs", "catalog"]
"""What the attacker has: the client's ``own`` adapter; what the client ``exchanged`` of it, where some of it stays at
home; a ``mixed`` one, of the other clients; the public ``base`` and the initial adapter; no weights of the client's,
but ``pairs`` of auxiliary texts and its states of them; or neither, but the ``catalog``, as everyone has it."""

PAIRS = 256
"""Auxiliary passes whose states an attacker at the level ``pairs`` has, unless told otherwise."""
_PASSES = 64
"""Auxiliary passes that a shortlist learns from."""


@dataclass(frozen=True)
class Guess:
    """What an attack says of one user's pass.

    Args:
        tokens: T tokens, ``None`` where it says nothing; ``None`` for an attack on the target alone.
        targets: Items, the likeliest target first; ``None`` to read it off the tokens, where they hold it.
    """

    tokens: tuple[int | None, ...] | None = None
    targets: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Attacker:
    """What an attack may use, besides what it sees.

    Args:
        knowledge: What it has.
        replica: The client's stages with the adapter that it has. With ``pairs`` only auxiliary texts may be run.
        catalog: The public catalog.
        popularity: (N,), how often each item is taken, which it is taken to know.
        auxiliary: Draws passes of public text, such as prompts of titles drawn by popularity; each a row of tokens.
        prefix: Tokens with which every pass begins.
        through: What becomes of states on their way to the server; the attacker knows how, not with which noise.
        clip_gradients: What the client does to a gradient at the second cut without drawing anything.
        seed: Of its draws.
        seconds: How long it may run candidates for a pass; what is left then it guesses without running any.
        pairs: Auxiliary passes whose states it has, where it has no weights.
    """

    knowledge: Knowledge
    replica: Replica
    catalog: Catalog
    popularity: Tensor
    auxiliary: Callable[[int, int], list[tuple[int, ...]]]
    prefix: tuple[int, ...] = ()
    through: Callable[[Tensor], Tensor] = field(default=lambda states: states)
    clip_gradients: Callable[[Tensor], Tensor] = field(default=lambda gradient: gradient)
    seed: int = 0
    seconds: float | None = None
    pairs: int = PAIRS

    @property
    def reads_items(self) -> bool:
        """Whether tokens are items."""
        return isinstance(self.replica.backbone, ItemVectors)

    def items_of(self, audit: str) -> ItemVectors:
        """Return the backbone of an attack on items.

        Raises:
            ConfigError: It does not read items.
        """
        backbone = self.replica.backbone
        if not isinstance(backbone, ItemVectors):
            raise ConfigError(f"{audit} was asked of backbone {backbone.name}", cure="Audit item_vectors with it.")
        return backbone

    def known(self, length: int) -> list[int | None]:
        """Write down what is known of a pass before the attack: its beginning."""
        return [*self.prefix[:length], *[None] * (length - len(self.prefix))]

    @cached_property
    def shortlist(self) -> Shortlist:
        """What proposes candidates, learned on auxiliary passes."""
        table = self.replica.embeddings(self.replica.vocabulary()).cpu()
        return Shortlist(*self.auxiliary_pairs(_PASSES), table)

    def auxiliary_pairs(self, passes: int, draw: int = 0) -> tuple[Tensor, Tensor]:
        """Run auxiliary passes: tokens (M,) and the states that the server would see of them (M, D)."""
        tokens, states = zip(*self.auxiliary_passes(passes, draw), strict=True)
        return torch.cat(tokens), torch.cat(states)

    def auxiliary_passes(self, passes: int, draw: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Run auxiliary passes: of each the tokens (T,) and the states that the server would see of it (T, D)."""
        for row in self.auxiliary(passes, self.seed + draw):
            ids = torch.tensor([row])
            yield ids[0], self.through(self.replica.states(ids))[0].cpu()


class Audit(ABC):
    """An attack, in a file of its own.

    Attributes:
        name: How it is asked for.
        knows: The levels of knowledge at which it can be run.
        by_default: Whether it runs unless other attacks are asked for; one that takes long does not.
        in_noise: Whether it runs by default where states are noisy, as it knows the noise.
        of_items: Whether it attacks backbones that read items alone.
        looks_at: The cut whose states or gradients it reads; what it finds does not depend on where the other one is.
        looks_at_everyone: Whether it is given all training passes of a client, not only those it is scored by.
    """

    name: ClassVar[str]
    knows: ClassVar[tuple[Knowledge, ...]] = ("own", "exchanged", "mixed", "base")
    by_default: ClassVar[bool] = True
    in_noise: ClassVar[bool] = False
    of_items: ClassVar[bool] = False
    looks_at: ClassVar[Literal["first", "second"]] = "first"
    looks_at_everyone: ClassVar[bool] = False

    @abstractmethod
    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Guess what each observed pass holds."""


AuditT = TypeVar("AuditT", bound=Audit)

AUDITS: dict[str, type[Audit]] = {}


def register(audit: type[AuditT]) -> type[AuditT]:
    """Register an attack under its ``name``; used as a decorator."""
    AUDITS[audit.name] = audit
    return audit


def make_audit(name: str) -> Audit:
    """Make an attack by its name.

    Raises:
        ConfigError: No attack has that name.
    """
    if name not in AUDITS:
        raise ConfigError(f"no audit is called {name!r}", cure=nearest(name, AUDITS))
    return AUDITS[name]()
