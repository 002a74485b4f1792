"""What every audit must do, as a class of tests to inherit: find what is bare, and find nothing in noise."""
# ruff: noqa: S101  (a contract is made of assertions)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pplr.backbones.base import Backbone, Batch
from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.config import AdapterConfig, ItemVectorsConfig, PromptConfig, TrainingConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample
from pplr.privacy.audits import Attacker, Guess, Knowledge, make_audit
from pplr.privacy.observing import Observation, observe, secret_of
from pplr.privacy.replica import Replica
from pplr.privacy.scoring import Reader, score
from pplr.privacy.states import StateGuard, clipped
from pplr.stages.boundary import Guard
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing.tiny import random_adapter, tiny_decoder, tiny_tokenizer

__all__ = ["AuditContract", "Scene"]

_ITEMS = 60
_USERS = 6
_HISTORY = 6
_FORESIGHT = 60
"""Steps in which states are moved until they predict a target."""
_TEMPERATURE = 10.0
"""By what scores are multiplied meanwhile: cosines alone would hardly differ."""


class Scene:
    """A tiny federation's server and what it sees, with an attacker.

    Args:
        name: Of the backbone; ``lists`` is causal_lm with every title a target.
        cut: k and m, of four blocks.
    """

    def __init__(self, name: str, cut: tuple[int, int]) -> None:
        draw = np.random.default_rng(0)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        titles = tuple("".join(draw.choice(letters, int(draw.integers(4, 7)))).title() for _ in range(_ITEMS))
        self.catalog = Catalog(tuple(f"t{number}" for number in range(_ITEMS)), titles)
        prompt = PromptConfig(targets="all" if name == "lists" else "one", instruction="Name the next.")
        text = CausalLM(tiny_decoder(seed=3), tiny_tokenizer(), prompt=prompt, max_tokens=512, folder="tiny")
        self.backbone: Backbone = text
        if name == "item_vectors":
            self.backbone = ItemVectors(text, ItemVectorsConfig(width=16, hidden_width=None))
            source = torch.Generator().manual_seed(5)
            self.backbone.prepare(
                self.catalog, lambda texts: torch.randn(len(texts), text.hidden_size, generator=source)
            )
        self.plan = CutPlan(*cut, self.backbone.total_layers)
        self.config = AdapterConfig(rank=2)
        self.model = CutModel(self.backbone, self.plan, self.config, TrainingConfig())
        blocks = random_adapter(self.model.shapes, seed=1, scale=0.1)
        ends = self.model.initial_adapter(1)
        self.adapter = {name: own if "lora_" in name else ends[name] for name, own in blocks.items()}
        self.samples = [self._sample(user, draw) for user in range(_USERS)]
        self.secrets = [secret_of(self.backbone, own, "0", self.catalog, _HISTORY) for own in self.samples]

    def _sample(self, user: int, draw: np.random.Generator) -> Sample:
        items = draw.choice(_ITEMS, int(draw.integers(3, _HISTORY + 1)), replace=False).tolist()
        return Sample(user, tuple(items[:-1]), items[-1], every=True)

    def row(self, sample: Sample) -> tuple[int, ...]:
        """Write what a pass is made of."""
        (encoded,) = self.backbone.encode([sample], self.catalog, _HISTORY)
        return (*encoded.prompt, *encoded.answer) if isinstance(self.backbone, CausalLM) else tuple(encoded.items)

    def auxiliary(self, passes: int, seed: int) -> list[tuple[int, ...]]:
        """Draw passes of public text."""
        draw = np.random.default_rng([7, seed])
        return [self.row(self._sample(-1 - number, draw)) for number in range(passes)]

    def batches(self) -> list[Batch]:
        """Make a pass of each user."""
        return [self.backbone.collate(self.backbone.encode([own], self.catalog, _HISTORY)) for own in self.samples]

    @cached_property
    def bare(self) -> list[Observation]:
        """What the server sees of each user, unguarded."""
        return self.seen()

    def seen(self, guard: Guard | None = None, passes: int = 1) -> list[Observation]:
        """What the server sees of each user, behind a guard and as the mean of several passes if asked."""
        return [
            observe(self.model, self.adapter, batch, lambda states: states, guard, passes) for batch in self.batches()
        ]

    @cached_property
    def predicting(self) -> list[Observation]:
        """What the server would see if its middle stage foresaw each target, which an untrained one does not."""
        replica, found = self.replica(), []
        for batch, own in zip(self.batches(), self.bare, strict=True):
            states = own.returned.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([states], lr=0.1 * float(own.returned.std()))
            for _ in range(_FORESIGHT):
                optimizer.zero_grad()
                self.backbone.loss(replica.leave(states[None]), batch, replica.output_ends).backward()
                optimizer.step()
            found.append(replace(own, returned=states.detach()))
        return found

    @cached_property
    def foreseeing(self) -> list[Observation]:
        """What the server would see if states at the first cut foresaw each next token, as those of a good model."""
        replica, found = self.replica(), []
        for own, secret in zip(self.bare, self.secrets, strict=True):
            states = own.states.clone().requires_grad_(True)
            wanted = torch.tensor(secret.tokens[1:])
            optimizer = torch.optim.Adam([states], lr=0.1 * float(own.states.std()))
            for _ in range(_FORESIGHT):
                optimizer.zero_grad()
                F.cross_entropy(_TEMPERATURE * self._scores(replica, states)[:-1], wanted).backward()
                optimizer.step()
            found.append(replace(own, states=states.detach()))
        return found

    def _scores(self, replica: Replica, states: Tensor) -> Tensor:
        """Apply norm and head, or the space of comparison, with gradients: (T, D) -> (T, V)."""
        if isinstance(self.backbone, ItemVectors):
            return self.backbone.queries(states, replica.output_ends) @ self.backbone.items(replica.output_ends).t()
        if not isinstance(self.backbone, CausalLM):
            raise TypeError(type(self.backbone).__name__)
        return self.backbone.logits(states).float()

    def replica(self, guard: StateGuard | None = None) -> Replica:
        """Copy the client's stages with its own adapter."""
        clip = (lambda states: states) if guard is None else guard.clip
        return Replica(self.backbone, self.plan, self.config, self.adapter, clip)

    def attacker(self, knowledge: Knowledge, guard: StateGuard | None = None) -> Attacker:
        """Make an attacker who has the client's own adapter, or pairs, and knows how states are guarded."""
        prefix: tuple[int, ...] = ()
        if isinstance(self.backbone, CausalLM):
            (start,) = (own.is_private.index(True) for own in self.secrets[:1])
            prefix = self.secrets[0].tokens[:start]
        popularity = torch.arange(_ITEMS).flip(0)
        through = (lambda states: states) if guard is None else guard.states
        clip = partial(clipped, clip_norm=None if guard is None else guard.config.gradient_clip_norm)
        replica = self.replica(guard)
        return Attacker(knowledge, replica, self.catalog, popularity, self.auxiliary, prefix, through, clip)

    def mean(self, guesses: Sequence[Guess], metric: str) -> float:
        """Average a metric over users."""
        reader = Reader(self.backbone, self.catalog)
        values = [score(guess, own, reader)[metric] for guess, own in zip(guesses, self.secrets, strict=True)]
        assert all(value is not None for value in values)
        return sum(float(value or 0) for value in values) / len(values)


@cache
def _scene(name: str, cut: tuple[int, int]) -> Scene:
    return Scene(name, cut)


class AuditContract:
    """Tests of an attack.

    Attributes:
        audit: Its name.
        metric: What it is judged by.
        finds: What it must reach at ``cut``, for each backbone that it attacks.
        levels: What its attackers have, of those that it can be run with.
        cut: k and m where it must succeed.
        chance: What it may reach at most on random states.
        draws: Of random states, over which that is averaged: with one, two of six users hit by luck are a third.
    """

    audit: ClassVar[str]
    metric: ClassVar[str] = "token_recovery"
    finds: ClassVar[dict[str, float]]
    levels: ClassVar[tuple[Knowledge, ...]] = ("own", "pairs")
    cut: ClassVar[tuple[int, int]] = (0, 1)
    chance: ClassVar[float] = 0.2
    draws: ClassVar[int] = 1

    def seen(self, scene: Scene) -> list[Observation]:
        """Choose what is attacked."""
        return scene.bare

    def test_it_finds_what_is_bare(self) -> None:
        """It succeeds where it must."""
        for backbone, wanted in self.finds.items():
            scene = _scene(backbone, self.cut)
            for knowledge in self.levels:
                if knowledge in make_audit(self.audit).knows:
                    guesses = make_audit(self.audit).attack(self.seen(scene), scene.attacker(knowledge))
                    found = scene.mean(guesses, self.metric)
                    assert found >= wanted, f"{backbone}, {knowledge}: {found}"

    def test_it_finds_nothing_in_random_states(self) -> None:
        """It fails where it must."""
        for backbone in self.finds:
            scene = _scene(backbone, self.cut)
            found = 0.0
            for draw in range(self.draws):
                seen = [_random(own, draw * _USERS + place) for place, own in enumerate(self.seen(scene))]
                guesses = make_audit(self.audit).attack(seen, scene.attacker(self.levels[0]))
                found += scene.mean(guesses, self.metric) / self.draws
            assert found <= self.chance, f"{backbone}: {found}"

    def test_it_does_not_look_at_the_truth(self) -> None:
        """The same observations give the same guesses, and those of another user give that user's."""
        for backbone in self.finds:
            scene = _scene(backbone, self.cut)
            seen = self.seen(scene)[:2]
            forward = make_audit(self.audit).attack(seen, scene.attacker(self.levels[0]))
            assert make_audit(self.audit).attack(seen[::-1], scene.attacker(self.levels[0])) == forward[::-1]


def _random(own: Observation, place: int) -> Observation:
    source = torch.Generator().manual_seed(place)

    def like(states: Tensor) -> Tensor:
        return torch.randn(states.shape, generator=source) * states.std()

    gradient = None if own.gradient is None else like(own.gradient)
    return replace(own, states=like(own.states), returned=like(own.returned), gradient=gradient)
