"""Beams run through a cut model, with every stage's keys and values where the stage is.

Shapes: B users, W beams of each, T tokens of a padded prompt, G tokens written so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.shared_row import common_prefix
from pplr.stages.client_model import ClientModel, GenerationCache
from pplr.stages.stage import StageCall

__all__ = ["Beams", "PackedBeams", "RowBeams", "beams_of", "padded_left"]


class Beams(Protocol):
    """Prompts and what was written after them, as the caches hold it."""

    def begin(self) -> Tensor:
        """Run the prompts and return the logits after each: (B, V)."""

    def step(self, users: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """Run a token of every beam.

        Args:
            users: (B',) those of the users so far who go on; the others are let go.
            parents: (B', W) the beam that each new one continues.
            tokens: (B', W) the token it adds.

        Returns:
            (B' · W, V) logits after it.
        """


def beams_of(model: ClientModel, cache: GenerationCache, prompts: Sequence[Sequence[int]]) -> Beams:
    """Choose how beams are held: packed, or each in a row where blocks look back a limited way only.

    Args:
        model: A client's model with a ``causal_lm`` backbone.
        cache: Its open caches, empty.
        prompts: B token sequences.
    """
    backbone = model.backbone
    if not isinstance(backbone, CausalLM):
        raise TypeError(f"only causal_lm generates, not {type(backbone).__name__}")
    kind = PackedBeams if backbone.takes_masks else RowBeams
    return kind(model, backbone, cache, prompts)


class PackedBeams:
    """All beams of a user in one row, each token of which sees the prompt and the beam that it continues.

    So the keys and values of a prompt are held and read once for all its beams, and no step moves any. What all
    prompts begin with alike, such as the instruction, is run once for all of them.

    Args:
        model: A client's model.
        backbone: Its backbone.
        cache: Its open caches, empty.
        prompts: B token sequences.
    """

    def __init__(
        self, model: ClientModel, backbone: CausalLM, cache: GenerationCache, prompts: Sequence[Sequence[int]]
    ) -> None:
        self._model, self._backbone, self._cache, self._prompts = model, backbone, cache, prompts
        self._prompt = torch.zeros(0)  # (B, T) whether a token of the prompts is real
        self._written = torch.zeros(0)  # (B, W, G) which of the tokens after the prompt a beam consists of

    def begin(self) -> Tensor:
        """Run what the prompts share once, then the rest of each: (B, V)."""
        shared = common_prefix(self._prompts) if len(self._prompts) > 1 else 0
        device = self._backbone.device
        if shared:
            self._decode(torch.tensor([self._prompts[0][:shared]], device=device), torch.ones(1, shared, device=device))
            self._model.reorder(self._cache, torch.zeros(len(self._prompts), dtype=torch.long, device=device))
        rest, real = padded_left([prompt[shared:] for prompt in self._prompts], self._backbone.pad_token)
        rest, real = rest.to(device), real.to(device)
        before = real.new_ones(len(rest), shared)
        self._prompt = torch.cat([before, real], dim=1).bool()
        self._written = torch.zeros(len(rest), 1, 0, dtype=torch.bool, device=device)
        if not shared:
            return self._logits(self._decode(rest, real)[:, -1])
        tokens = rest.shape[1]
        own = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril() & real[:, None].bool()
        own |= torch.eye(tokens, dtype=torch.bool, device=device)  # padding sees itself, and nobody sees it
        sees = torch.cat([before[:, None].expand(-1, tokens, -1).bool(), own], dim=2)  # (B, tokens, T)
        return self._logits(self._see(rest, sees, real.sum(dim=1))[:, -1])

    def step(self, users: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """Run a token of every beam; see :class:`Beams`."""
        width = parents.shape[1]
        if len(users) < len(self._prompt):
            self._model.reorder(self._cache, users)
            self._prompt = self._prompt[users]
        written = self._written[users[:, None], parents]  # (B, W, G)
        new = torch.eye(width, dtype=torch.bool, device=written.device).expand(len(users), -1, -1)
        self._written = torch.cat([written, new], dim=2)
        sees = torch.cat([self._prompt[:, None].expand(-1, width, -1), self._written], dim=2)  # (B, W, T + G)
        states = self._see(tokens, sees, torch.full((len(users),), width))
        return self._logits(states.flatten(0, 1))

    def _decode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        mask = mask.long()
        return self._model.decode(tokens, StageCall(attention_mask=mask, position_ids=_positions(mask)), self._cache)

    def _see(self, tokens: Tensor, sees: Tensor, real: Tensor) -> Tensor:
        call = StageCall(attention_mask=sees[:, None], position_ids=sees.sum(dim=2) - 1, lengths=real)
        return self._model.decode(tokens, call, self._cache)

    def _logits(self, states: Tensor) -> Tensor:
        return self._backbone.logits(states)


class RowBeams:
    """Each beam in a row of its own, its prompt's keys and values among it.

    Args:
        model: A client's model.
        backbone: Its backbone.
        cache: Its open caches, empty.
        prompts: B token sequences.
    """

    def __init__(
        self, model: ClientModel, backbone: CausalLM, cache: GenerationCache, prompts: Sequence[Sequence[int]]
    ) -> None:
        self._model, self._backbone, self._cache, self._prompts = model, backbone, cache, prompts
        self._mask = torch.zeros(0)  # (rows, T + G)
        self._width = 1

    def begin(self) -> Tensor:
        """Run the prompts: (B, V)."""
        tokens, mask = padded_left(self._prompts, self._backbone.pad_token)
        self._mask = mask.to(self._backbone.device)
        return self._run(tokens.to(self._backbone.device))

    def step(self, users: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """Run a token of every beam; see :class:`Beams`."""
        rows = (users[:, None] * self._width + parents).flatten()
        self._width = parents.shape[1]
        self._model.reorder(self._cache, rows)
        self._mask = torch.cat([self._mask[rows], self._mask.new_ones(len(rows), 1)], dim=1)
        return self._run(tokens.reshape(-1, 1))

    def _run(self, tokens: Tensor) -> Tensor:
        positions = _positions(self._mask)[:, -tokens.shape[1] :]
        call = StageCall(attention_mask=self._mask, position_ids=positions)
        return self._backbone.logits(self._model.decode(tokens, call, self._cache)[:, -1])


def padded_left(prompts: Sequence[Sequence[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left: (B, T) tokens, and (B, T) 1 where one is real."""
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad_token, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask


def _positions(mask: Tensor) -> Tensor:
    """Number tokens (B, T) from 0 at each row's first real one."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
