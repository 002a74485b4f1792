"""Beam search over many users, who leave the batch as soon as nothing can be added to what was found for them.

It finds what ``generate`` of transformers finds for each user alone (``early_stopping=False``). That one keeps every
user in the batch until the last is done.

Shapes: B users, b of them still searching, W beams, K candidates, P tokens of a padded prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import LogitsProcessor

from pplr.recommend.decoding import Beams

__all__ = ["Found", "TellsUsersApart", "search"]

_NEVER = -1e9  # what transformers takes for the score of a beam that holds nothing


@runtime_checkable
class TellsUsersApart(Protocol):
    """A processor whose rows are not all treated alike."""

    def keep(self, users: Tensor) -> None:
        """Go on with these of the users so far: (b,)."""


@dataclass(frozen=True)
class Found:
    """The best sequences of each user.

    Args:
        sequences: (B, W, P + longest) tokens after the prompt, filled up by end tokens.
        scores: (B, W) sums of log-probabilities, divided by length^length_penalty, best first.
        lengths: (B, W) tokens written, 0 where a beam holds nothing.
    """

    sequences: Tensor
    scores: Tensor
    lengths: Tensor


def search(
    model: Beams,
    prompts: Tensor,
    *,
    width: int,
    longest: int,
    ends: Sequence[int],
    length_penalty: float,
    processors: Sequence[LogitsProcessor],
) -> Found:
    """Write on after prompts.

    Args:
        model: The prompts, not begun.
        prompts: (B, P) the same, padded, for the processors.
        width: W; 1 is greedy.
        longest: Most tokens to write.
        ends: Tokens that end a sequence; the first fills up.
        length_penalty: Exponent of the length by which a score is divided.
        processors: Applied to log-probabilities, or to logits where the search is greedy. One that does not treat
            all rows alike has to be a :class:`TellsUsersApart`.
    """
    batch, device = len(prompts), prompts.device
    endings = torch.tensor(ends, device=device)
    users = torch.arange(batch, device=device)  # (b,) who is searching
    running = prompts[:, None]  # (b, 1 then W, P + written)
    scores = torch.zeros(batch, 1, device=device)
    filler = torch.full((batch, width, longest), ends[0], device=device)
    best = torch.cat([running.expand(-1, width, -1), filler], dim=2)  # (B, W, P + longest)
    best_scores = torch.full((batch, width), _NEVER, device=device)
    lengths = torch.zeros(batch, width, dtype=torch.long, device=device)
    logits = model.begin()
    for written in range(1, longest + 1):
        told = logits.float() if width == 1 else torch.log_softmax(logits.float(), dim=-1)
        for processor in processors:
            told = processor(running.flatten(0, 1), told)
        total = told.view(len(users), -1, told.shape[-1]) + scores[:, :, None]
        top, places = total.flatten(1).topk(min((1 + len(ends)) * width, total[0].numel()))  # (b, K)
        parents, tokens = places // told.shape[-1], places % told.shape[-1]
        stops = torch.isin(tokens, endings) | (written == longest)
        scale = float(written) ** length_penalty

        # Those that end now, against those that ended before; only among the best W are they good enough.
        now = stops & (torch.arange(stops.shape[1], device=device) < width)
        merged = torch.cat([best_scores[users], torch.where(now, top / scale, _NEVER)], dim=1)
        grown = torch.cat([running.gather(1, _along(parents, running)), tokens[:, :, None]], dim=2)
        rest = grown.new_full((*tokens.shape, longest - written), ends[0])
        sequences = torch.cat([best[users], torch.cat([grown, rest], dim=2)], dim=1)
        held = torch.cat([lengths[users], now * written], dim=1)
        merged, chosen = merged.topk(width)
        best[users] = sequences.gather(1, _along(chosen, sequences))
        best_scores[users], lengths[users] = merged, held.gather(1, chosen)

        # Those that go on, and whether they may still beat what ended.
        scores, chosen = (top + stops * _NEVER).topk(width)
        worst = torch.where(lengths[users] > 0, best_scores[users].amin(dim=1, keepdim=True), _NEVER)
        open_ = (scores[:, :1] / scale > worst).any(dim=1) & ~stops.all(dim=1)
        going = open_.nonzero().flatten()
        if len(going) == 0:
            break
        if len(going) < len(users):
            for processor in processors:
                if isinstance(processor, TellsUsersApart):
                    processor.keep(going)
        users, scores, chosen = users[going], scores[going], chosen[going]
        running = grown[going].gather(1, _along(chosen, grown))
        if width == 1:
            scores = torch.zeros_like(scores)  # the greedy search compares the logits of one step
        logits = model.step(going, parents[going].gather(1, chosen), tokens[going].gather(1, chosen))
    return Found(best, best_scores, lengths)


def _along(chosen: Tensor, sequences: Tensor) -> Tensor:
    """Repeat (b, W) choices over the tokens of (b, ..., tokens)."""
    return chosen[:, :, None].expand(-1, -1, sequences.shape[2])
