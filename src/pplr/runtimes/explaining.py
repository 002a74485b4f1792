"""One request, looked at from all sides: its lists, why, what crossed the cut for it, and what that gives away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pplr.backbones.adapters import AdapterState, check_adapter
from pplr.backbones.base import MatchingBackbone
from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.lazy import LazyMapping
from pplr.privacy.audits import Attacker, Knowledge, make_audit
from pplr.privacy.observing import Observation
from pplr.privacy.recording import Exchange, Recorder
from pplr.privacy.scoring import Reader
from pplr.progress import Progress, Silent
from pplr.recommend.evaluation import Ranker
from pplr.recommend.floors import fit_floor
from pplr.recommend.generative import GenerativeRanker
from pplr.runtimes.attacking import Attackers, rounded
from pplr.runtimes.recommending import (
    Recommendation,
    Request,
    best_items,
    check_finished,
    make_request,
    reading,
    saved_adapter,
)
from pplr.stages.client_model import ClientModel

if TYPE_CHECKING:
    from pplr.runtimes.run import Run

__all__ = ["Answer", "Explainer", "Near", "ReadBack"]

_NEAREST = 2
_KEPT = 8
"""Clients whose adapters and attackers stay in memory."""
_ATTACK = "catalog_matching"
_SECONDS, _SECONDS_ON_TEXT = 3.0, 30.0
"""How long an attack may run candidates for one request: of items, and of the many more tokens that text is made of."""


@dataclass(frozen=True)
class Near:
    """An item of the history that resembles a recommended one.

    Args:
        title: Its title.
        similarity: Cosine, -1 to 1.
    """

    title: str
    similarity: float


@dataclass(frozen=True)
class Answer:
    """What one adapter recommends, and what that took.

    Args:
        items: The best first.
        near: For each item the nearest ones of the history that the model read.
        exchanges: What crossed the cut.
        seconds: For the ranking.
        states: (T, D) float32, what the server saw of the history; ``None`` where nothing crossed.
    """

    items: tuple[Recommendation, ...]
    near: tuple[tuple[Near, ...], ...]
    exchanges: tuple[Exchange, ...]
    seconds: float
    states: torch.Tensor | None


@dataclass(frozen=True)
class ReadBack:
    """What an attack read out of one request.

    Args:
        attack: Its name.
        knowledge: What the attacker had besides the states.
        rows: The history's titles, oldest first, each with what was read in its place; ``None`` where nothing was.
            Of text, whose titles have no places, each with itself if it was read anywhere, else ``None``.
        by_place: Whether rows tell what was read in a title's place, not only whether it was read.
        wrong: Titles that were read and are not in the history.
        share: Of the history's titles, those that were read.
        guess_share: Of the history's titles, those among as many of the most popular ones.
        seconds: That the attack took, once it had learned what it knows before any request.
        hurried: Whether its time was up before the end, so that it took the first guess for the rest.
    """

    attack: str
    knowledge: Knowledge
    rows: tuple[tuple[str, str | None], ...]
    by_place: bool
    wrong: tuple[str, ...]
    share: float
    guess_share: float
    seconds: float
    hurried: bool


class Explainer:
    """Answers requests to a finished run, and explains the answers. One request at a time.

    Args:
        run: The run.
        progress: Told of every step.

    Raises:
        RunError: The run is not finished.
    """

    def __init__(self, run: Run, progress: Progress | None = None) -> None:
        check_finished(run.folder)
        self.run = run
        self.parts = run.assembly(progress or Silent())
        self.parts.check_secrets()
        self.catalog = self.parts.data.dataset.catalog
        self.saved = lru_cache(_KEPT)(lambda client: saved_adapter(run, self.parts, client))
        self._attacker = lru_cache(_KEPT)(self._make_attacker)

    def request(self, client: str | None, *, user: str | None = None, history: Sequence[str] | None = None) -> Request:
        """Find out who is meant; see :meth:`~pplr.runtimes.run.Run.recommend`."""
        return make_request(self.parts, client, user, history)

    # -- lists ------------------------------------------------------------------------------------------------

    def after(self, request: Request, count: int) -> Answer:
        """Recommend by the client's own adapter as the run left it."""
        return self._answer(request, self.saved(request.client), count)

    def before(self, request: Request, count: int) -> tuple[str, Answer]:
        """Recommend by what the client had before it met the others.

        Returns:
            What that is, in words, and the answer.
        """
        what, adapter = self._before(request.client)
        return what, self._answer(request, adapter, count)

    def popular(self, request: Request, count: int) -> tuple[Recommendation, ...]:
        """Recommend what was taken most in training, by everyone."""
        scores = self._popularity.scores([request.case])[0]
        return best_items(scores, request.case.seen, count, self.catalog)

    def _before(self, client: str) -> tuple[str, AdapterState]:
        kept = self.run.folder / "rounds" / "1" / client / "local.safetensors"
        if not kept.exists():
            return "the adapter that every client starts from, not trained at all", self.parts.start_of(client)
        adapter = dict(load_file(kept))
        check_adapter(adapter, self.parts.model.shapes, whose=f"the adapter of client {client} before mixing")
        return "the client's adapter after its own training of server round 1, not mixed with any other", adapter

    def _answer(self, request: Request, adapter: AdapterState, count: int) -> Answer:
        with reading(self.parts, request.client, adapter) as reader:
            ranker = self.parts.ranker(reader)
            recorder = None
            if reader.transport is not None:
                prompt = ranker.sizes([request.case])[0] if isinstance(ranker, GenerativeRanker) else None
                reader.transport = recorder = Recorder(reader.transport, prompt)
            began = time.perf_counter()
            scores = ranker.scores([request.case])[0]
            seconds = time.perf_counter() - began
            items = best_items(scores, request.case.seen, count, self.catalog)
            near = self._near(reader, request, items)
        exchanges = () if recorder is None else tuple(recorder.exchanges)
        return Answer(items, near, exchanges, seconds, None if recorder is None else recorder.first)

    @cached_property
    def _popularity(self) -> Ranker:
        return fit_floor("popularity", self.parts.data.holdout, len(self.catalog), self.run.config.run.seed)

    # -- why --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _near(
        self, reader: ClientModel, request: Request, items: Sequence[Recommendation]
    ) -> tuple[tuple[Near, ...], ...]:
        """Find the items of the history that are nearest to each recommended one, as the model places them."""
        history = list(dict.fromkeys(request.case.history))
        number = {item_id: place for place, item_id in enumerate(self.catalog.item_ids)}
        chosen = torch.tensor([*history, *(number[own.item_id] for own in items)], dtype=torch.long)
        backbone = self.parts.backbone
        if isinstance(backbone, MatchingBackbone):
            placed = backbone.items(reader.output_end, chosen.to(backbone.device)).cpu()  # (M, width)
        else:
            space = self.parts.space
            centre = space.embeddings[space.title_of].mean(dim=0)
            placed = F.normalize(space.embeddings[space.title_of[chosen]] - centre, dim=-1)
        alike = placed[len(history) :] @ placed[: len(history)].t()  # (K, history)
        best = alike.topk(min(_NEAREST, len(history)), dim=-1)
        return tuple(
            tuple(
                Near(self.catalog.titles[history[place]], value)
                for value, place in zip(values.tolist(), places.tolist(), strict=True)
            )
            for values, places in zip(best.values, best.indices, strict=True)
        )

    @property
    def nearness(self) -> str:
        """Say between what the similarity of two items is measured."""
        if isinstance(self.parts.backbone, MatchingBackbone):
            return "cosine of the two items' vectors in the space where this model ranks"
        return "cosine of the two titles' embeddings by the base model, less the catalog's mean"

    # -- what it gives away -----------------------------------------------------------------------------------

    @property
    def attacks_long(self) -> bool:
        """Whether an attack takes as long as an answer or longer: it tries tokens of text, not items."""
        return isinstance(self.parts.backbone, CausalLM)

    def read_back(self, request: Request, answer: Answer) -> ReadBack | str:
        """Attack what the server saw of a request.

        Returns:
            What was read, or why nothing can be said.
        """
        backbone = self.parts.backbone
        if answer.states is None:
            return "The model is not cut, so nothing crossed for this request."
        if not isinstance(backbone, CausalLM | ItemVectors):
            return (
                f"No attack is written for the backbone {backbone.name} yet: how much a server reads is not measured. "
                "Count the history as known to whoever runs it."
            )
        attacker = self._attacker(request.client)
        attacker.shortlist  # noqa: B018  (learned before the clock starts)
        began = time.perf_counter()
        states = rounded(answer.states, self.run.config.runtime.wire) if self.parts.is_remote else answer.states
        (guess,) = make_audit(_ATTACK).attack([Observation(states, states, None)], attacker)
        seconds, tokens = time.perf_counter() - began, guess.tokens or ()
        reader = self._reader
        truth = [reader.first(item) for item in self._crossed(request)]
        found = reader.request(tokens)
        by_place = isinstance(backbone, ItemVectors)
        if by_place:
            placed = [None if token is None else reader.first(token) for token in tokens]
        else:
            placed = [own if own in set(found) else None for own in truth]
        popular = self.attackers.popularity.argsort(descending=True, stable=True).tolist()
        ranked = list(dict.fromkeys(reader.first(item) for item in popular))[: len(set(truth))]
        titles = self.catalog.titles
        return ReadBack(
            attack=_ATTACK,
            knowledge=attacker.knowledge,
            rows=tuple(
                (titles[own], None if guessed is None else titles[guessed])
                for own, guessed in zip(truth, placed, strict=True)
            ),
            by_place=by_place,
            wrong=tuple(titles[own] for own in dict.fromkeys(found) if own not in truth),
            share=_share(truth, found),
            guess_share=_share(truth, ranked),
            seconds=seconds,
            hurried=attacker.seconds is not None and seconds >= attacker.seconds,
        )

    @cached_property
    def attackers(self) -> Attackers:
        """Makes attackers on the run's clients."""
        names = self.parts.data.partition.names
        return Attackers(self.parts, LazyMapping(names, self.saved), seed=0)

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.parts.backbone, self.catalog)

    def _make_attacker(self, client: str) -> Attacker:
        """Make the strongest attacker that the federation's server can be."""
        level: Literal["own", "exchanged"] = "exchanged" if self.attackers.keeps_some_at_home else "own"
        wire = self.run.config.runtime.wire
        through = (lambda states: rounded(states, wire)) if self.parts.is_remote else (lambda states: states)
        plan, states = self.parts.model_of(client).plan, self.run.config.privacy.states
        limit = _SECONDS_ON_TEXT if self.attacks_long else _SECONDS
        return self.attackers.make(level, client, plan, states, through, seconds=limit)

    def _crossed(self, request: Request) -> list[int]:
        """List the items that a pass holds; a prompt that was too long has lost the oldest."""
        history, backbone = list(request.case.history), self.parts.backbone
        if not isinstance(backbone, CausalLM):
            return history
        titles = [self.catalog.titles[item] for item in history]
        _, kept = backbone.titles.prompt(titles, backbone.answer_room(self.catalog), backbone.max_tokens)
        return history[-kept:]


def _share(truth: Sequence[int], found: Sequence[int]) -> float:
    return len(set(truth) & set(found)) / len(set(truth))
