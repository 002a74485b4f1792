"""Take for the target the candidate whose loss would have sent back the gradient that was seen at the second cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.privacy.audits.answers import Answers
from pplr.privacy.audits.base import Attacker, Audit, Guess, register
from pplr.privacy.observing import Observation
from pplr.privacy.replica import Replica

__all__ = ["LabelGradients"]

_BEST = 10
_SHORT = 128
"""Titles whose gradients are taken through the output stage's blocks."""
_STATES = 2_048
"""States that run at once."""
_NOTHING = 1e-9
"""Share of the largest gradient below which a position is taken to have none."""


@register
class LabelGradients(Audit):
    r"""argmax_c cos(∂ℓ(c)/∂h, g), with g the gradient seen and h the states that the server sent.

    Where a client clips each token's gradient, candidates' are clipped as it does: positions then differ in length less
    than they would, and the cosine over all of them would take that for a difference between candidates.

    The cosine does not depend on by how many targets a client divides its loss, and it orders candidates as their
    distance to g does at each one's best scale.

    Where the backbone reads items, the gradient of the last state follows from its own target alone, as nothing later
    is predicted; every item is tried there. Without an output block that is so at every position, and the target and
    all of the history but its first item are read. The loss is taken over the whole catalog: exact, but for
    clients that compare with drawn negatives, which the attacker does not know, or leave items out.

    Where it reads text, the catalog's titles are tried as answers, all over the last positions, as many as the longest
    has tokens; before an answer there is nothing to predict. Without an output block a position's gradient is that of
    its own token, so the answer is as long as there are gradients, and only such titles are tried. Behind blocks
    attention spreads gradients to earlier positions, so titles of all lengths are tried: first by what norm and head
    alone send back, and the best of them through the blocks. In a list the titles before the target are predicted too:
    there each candidate is compared over its own positions alone, whose gradients follow from nothing before them.

    Cites:
        chen2024bisr
        li2022label
    """

    name: ClassVar[str] = "label_gradients"
    looks_at: ClassVar[Literal["first", "second"]] = "second"

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Guess the target of each pass."""
        answers = None if attacker.reads_items else Answers(attacker)
        guesses = []
        for own in seen:
            if own.gradient is None:
                guesses.append(Guess())
            elif answers is not None:
                guesses.append(Guess(targets=tuple(_titles(own, attacker, answers)[:_BEST].tolist())))
            else:
                last, tokens = own.length - 1, None
                if len(attacker.replica.plan.output) == 0:
                    tokens = (None, *(int(_items(own, place, attacker)[0]) for place in range(last)))
                guesses.append(Guess(tokens, tuple(_items(own, last, attacker)[:_BEST].tolist())))
        return guesses


def _items(own: Observation, place: int, attacker: Attacker) -> Tensor:
    """Rank a catalog's items as what the state at a place is to predict: (N,)."""
    gradient = cast(Tensor, own.gradient)
    replica = attacker.replica
    backbone = cast(ItemVectors, replica.backbone)
    ends, temperature = replica.output_ends, backbone.config.temperature
    places = range(place, place + 1)

    def end(states: Tensor) -> Tensor:
        return backbone.queries(states, ends)

    with torch.no_grad():
        items = backbone.items(ends)  # (N, width)
        query = end(_left(own, places, replica, 1))[0, 0]  # (width,)
        expected = F.softmax(items @ query / temperature, dim=-1) @ items
        wanted = (expected - items)[:, None] / temperature  # (N, 1, width), of the loss at the query
    return _cosines(_sent_back(own, places, replica, end, wanted), gradient[place : place + 1]).argsort(descending=True)


def _titles(own: Observation, attacker: Attacker, answers: Answers) -> Tensor:
    """Rank a catalog's titles as answers: (S,) items."""
    replica = attacker.replica
    backbone = cast(CausalLM, replica.backbone)
    blocks = len(replica.plan.output)
    chosen = _lengths_that_fit(own, answers, alone=blocks == 0)
    if len(chosen) == 0:
        return chosen
    places = range(own.length - 1 - int(answers.lengths[chosen].max()), own.length - 1)
    seen = cast(Tensor, own.gradient)[places.start : places.stop]
    tokens = answers.tokens(chosen, len(places))  # (S, W)
    with torch.no_grad():
        left = _left(own, places, replica, 1)  # (1, W, D)
        logits = backbone.model.lm_head(backbone.final_states(left))[0].float()  # (W, V)
        head = backbone.model.lm_head.weight
        expected = F.softmax(logits, dim=-1) @ head.float()  # (W, D)

    def at_own(rows: Tensor) -> Tensor | None:
        return tokens[rows] >= 0 if answers.is_line else None

    def wanted(rows: Tensor) -> Tensor:
        own_tokens = tokens[rows].to(head.device)
        differences = expected - head[own_tokens.clamp(min=0)].float()  # (S, W, D)
        return differences.masked_fill((own_tokens < 0)[..., None], 0.0)

    every = torch.arange(len(chosen))
    if blocks > 0 and len(chosen) > _SHORT:
        parts = every.split(max(1, _STATES // len(places)))
        near = [
            _cosines(attacker.clip_gradients(_pulled(left, backbone.final_states, wanted(part))), seen, at_own(part))
            for part in parts
        ]
        every = torch.cat(near).topk(_SHORT).indices
    parts = every.split(max(1, _STATES // len(places)))
    sent = []
    for part in parts:
        candidates = _sent_back(own, places, replica, backbone.final_states, wanted(part))
        sent.append(_cosines(attacker.clip_gradients(candidates), seen, at_own(part)))
    return answers.items[chosen[every[torch.cat(sent).argsort(descending=True)]]]


def _lengths_that_fit(own: Observation, answers: Answers, *, alone: bool) -> Tensor:
    """Choose titles by the number of positions that have a gradient, where each has its own token's alone."""
    chosen = answers.fitting(own.length)
    if alone and not answers.is_line:
        sizes = cast(Tensor, own.gradient).norm(dim=-1)
        begins = int((sizes > _NOTHING * sizes.max()).float().argmax())
        same = chosen[answers.lengths[chosen] == own.length - 1 - begins]
        chosen = same if len(same) else chosen
    return chosen


def _left(own: Observation, places: range, replica: Replica, rows: int) -> Tensor:
    """Run what was sent at some places through the output stage's blocks, the same in each row: (rows, W, D)."""
    states = own.returned[None, places.start : places.stop].expand(rows, -1, -1)
    return replica.leave(states, own.returned[: places.start])


def _pulled(states: Tensor, end: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Take gradients back through an end.

    Args:
        states: (1, W, D).
        end: Maps (S, W, D) to (S, W, E).
        wanted: (S, W, E), gradients at the end.

    Returns:
        (S, W, D) float32.
    """
    rows = states.detach().expand(len(wanted), -1, -1).clone().requires_grad_(True)
    out = end(rows)
    (pulled,) = torch.autograd.grad(out, rows, wanted.to(out))
    return pulled.float().cpu()


def _sent_back(
    own: Observation, places: range, replica: Replica, end: Callable[[Tensor], Tensor], wanted: Tensor
) -> Tensor:
    """Compute what would come back at the second cut at some places: (S, W, E) at the end -> (S, W, D)."""
    states, past = own.returned[None, places.start : places.stop], own.returned[: places.start]
    parts = wanted.split(max(1, _STATES // len(places)))
    return torch.cat([_pulled(states, lambda rows: end(replica.leave(rows, past)), part) for part in parts])


def _cosines(candidates: Tensor, seen: Tensor, places: Tensor | None = None) -> Tensor:
    """Compare gradients, over all places at once or over some: (S, W, D), (W, D), (S, W) -> (S,)."""
    seen = seen.cpu()[None]
    if places is not None:
        candidates, seen = candidates * places[..., None], seen * places[..., None]
    return F.cosine_similarity(candidates.flatten(1), seen.flatten(1), dim=-1)
