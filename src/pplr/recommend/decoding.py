"""Beams run through a cut model, with every stage's keys and values where the stage is.

Shapes: B users, W beams of each, T tokens of a padded prompt, G tokens written so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.shared_row import common_prefix
from pplr.stages.client_model import ClientModel
from pplr.stages.generation import Generation
from pplr.stages.stage import StageCall

__all__ = ["Beams", "PackedBeams", "RowBeams", "TokenTree", "beams_of", "padded_left"]


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


def beams_of(
    model: ClientModel, generation: Generation, prompts: Sequence[Sequence[int]], opening: Sequence[int] = ()
) -> Beams:
    """Choose how beams are held: packed, or each in a row where blocks look back a limited way only.

    Args:
        model: A client's model with a ``causal_lm`` backbone.
        generation: Its open caches, empty.
        prompts: B token sequences.
        opening: What every prompt begins with, whoever it is about.
    """
    backbone = model.backbone
    if not isinstance(backbone, CausalLM):
        raise TypeError(f"only causal_lm generates, not {type(backbone).__name__}")
    if backbone.takes_masks:
        return PackedBeams(model, backbone, generation, prompts, opening)
    return RowBeams(backbone, generation, prompts)


class TokenTree:
    """A row for each user: its prompt, and a tree of tokens after it, each of which sees the prompt and the way to it.

    So the keys and values of a prompt are held and read once for all that is written after it, and no step moves any.
    Several tokens that follow one another can be run at once. What all prompts begin with alike, such as the
    instruction, is run once for all of them.

    What can be written on after has a number in its row, its slot: 0 is the prompt, then tokens in the order in which
    they were run, padding among them. Letters: S slots of a row, L tokens in the caches.

    Args:
        model: A client's model.
        backbone: Its backbone.
        generation: Its open caches, empty.
        opening: What every prompt begins with, whoever it is about; see
            :meth:`~pplr.stages.client_model.ClientModel.opening`.
    """

    def __init__(
        self, model: ClientModel, backbone: CausalLM, generation: Generation, opening: Sequence[int] = ()
    ) -> None:
        self._model, self._backbone, self._generation = model, backbone, generation
        self._opening = tuple(opening)
        self._sees: NDArray[np.bool_] = np.zeros((0, 1, 0), dtype=np.bool_)  # (B, S, L) what follows a slot sees
        self._first = 1  # the slot that is second in what is held; those between 0 and it belonged to rows that left
        self._entered: list[int] = []  # B numbers, the first slot after each row's prompt

    @property
    def is_used(self) -> bool:
        """Whether prompts were run."""
        return self._sees.shape[2] > 0

    @property
    def slots(self) -> int:
        """The number of the first slot that :meth:`extend` will give."""
        return self._first - 1 + self._sees.shape[1]

    def begin(self, prompts: Sequence[Sequence[int]], tail: int = 1) -> Tensor:
        """Run prompts, what they share once: the states of their last tokens, (B, tail, D), before the final norm.

        Args:
            prompts: B token sequences.
            tail: How many of the last states; those that a shorter prompt lacks are of no use.
        """
        device, shared = self._backbone.device, len(self._opening)
        begins = all(len(own) >= shared + tail and tuple(own[:shared]) == self._opening for own in prompts)
        kept = self._model.opening(self._opening) if begins else None
        if kept is not None:
            self._generation.append_rows(kept, torch.zeros(len(prompts), dtype=torch.long, device=device))
        elif len(prompts) > 1:
            shared = min(common_prefix(prompts), min(map(len, prompts)) - tail)
        else:
            shared = 0
        if shared > 0 and kept is None:
            self._decode(torch.tensor([prompts[0][:shared]], device=device), torch.ones(1, shared, device=device))
            self._generation.reorder(torch.zeros(len(prompts), dtype=torch.long, device=device))
        shared = max(shared, 0)
        rest, real = padded_left([prompt[shared:] for prompt in prompts], self._backbone.pad_token)
        tokens, is_real = rest.shape[1], real.bool().numpy()
        before = np.ones((len(rest), shared), dtype=np.bool_)
        self._entered = [1] * len(rest)
        self._sees = np.concatenate([before, is_real], axis=1)[:, None]
        if not shared:
            return self._decode(rest.to(device), real.to(device))[:, -tail:]
        own = np.tri(tokens, dtype=np.bool_) & is_real[:, None]
        own |= np.eye(tokens, dtype=np.bool_)  # padding sees itself, and nobody sees it
        sees = np.concatenate([np.repeat(before[:, None], tokens, axis=1), own], axis=2)  # (B, tokens, L)
        return self._see(rest, sees, real.sum(dim=1))[:, -tail:]

    def join(self, prompts: Sequence[Sequence[int]], tail: int = 1) -> Tensor:
        """Let new users' prompts be rows after those that are there; see :meth:`begin`.

        Tokens that none of the present rows sees any more are let go of.
        """
        with self._model.generation() as fresh_generation:
            fresh = TokenTree(self._model, self._backbone, fresh_generation, self._opening)
            states = fresh.begin(prompts, tail)
            skip = int(self._sees.any(axis=(0, 1)).argmax())
            rows = torch.arange(len(prompts), device=self._backbone.device)
            self._generation.append_rows(fresh_generation, rows, skip)
        gone = min(self._entered) - self._first
        old, new = np.delete(self._sees[:, :, skip:], slice(1, 1 + gone), axis=1), fresh._sees
        self._first += gone
        self._entered += [self._first - 1 + old.shape[1]] * len(new)
        longest, slots = max(old.shape[2], new.shape[2]), old.shape[1]
        self._sees = np.zeros((len(old) + len(new), slots, longest), dtype=np.bool_)
        self._sees[: len(old), :, longest - old.shape[2] :] = old
        self._sees[len(old) :, :1, longest - new.shape[2] :] = new
        return states

    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all rows but these."""
        if list(rows) != list(range(len(self._sees))):
            self._generation.reorder(torch.tensor(rows, dtype=torch.long, device=self._backbone.device))
            self._sees = self._sees[list(rows)]
            self._entered = [self._entered[row] for row in rows]

    def extend(self, tokens: NDArray[np.int64], after: NDArray[np.int64]) -> Tensor:
        """Run tokens: the states after them, (B, T, D), before the final norm.

        Args:
            tokens: (B, T), padded on the left.
            after: (B, T) the slot that each follows, which may be one of an earlier column; -1 for padding.
        """
        rows, slots, past = self._sees.shape
        new = tokens.shape[1]
        sees = np.zeros((rows, slots + new, past + new), dtype=np.bool_)
        sees[:, :slots, :past] = self._sees
        places = np.where(after > 0, after - self._first + 1, after)
        for column in range(new):
            real = np.flatnonzero(places[:, column] >= 0)
            sees[real, slots + column] = sees[real, places[real, column]]
            sees[:, slots + column, past + column] = True
        self._sees = sees
        return self._see(torch.from_numpy(tokens), sees[:, slots:], torch.from_numpy((after >= 0).sum(axis=1)))

    def _decode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        mask = mask.long()
        return self._generation.decode(tokens, StageCall(attention_mask=mask, position_ids=_positions(mask)))

    def _see(self, tokens: Tensor, told: NDArray[np.bool_], real: Tensor) -> Tensor:
        device = self._backbone.device
        sees = torch.from_numpy(told).to(device)
        call = StageCall(attention_mask=sees[:, None], position_ids=sees.sum(dim=2) - 1, lengths=real.to(device))
        return self._generation.decode(tokens.to(device), call)


class PackedBeams:
    """All beams of a user in one row; see :class:`TokenTree`.

    Args:
        model: A client's model.
        backbone: Its backbone.
        generation: Its open caches, empty.
        prompts: B token sequences.
        opening: What every prompt begins with, whoever it is about.
    """

    def __init__(
        self,
        model: ClientModel,
        backbone: CausalLM,
        generation: Generation,
        prompts: Sequence[Sequence[int]],
        opening: Sequence[int] = (),
    ) -> None:
        self._backbone, self._prompts = backbone, prompts
        self._tree = TokenTree(model, backbone, generation, opening)
        self._slots = np.zeros((len(prompts), 1), dtype=np.int64)  # (B, W) where each beam ends

    def begin(self) -> Tensor:
        """Run what the prompts share once, then the rest of each: (B, V)."""
        return self._backbone.logits(self._tree.begin(self._prompts)[:, -1])

    def step(self, users: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """Run a token of every beam; see :class:`Beams`."""
        rows, width = users.cpu().numpy(), parents.shape[1]
        self._tree.keep(rows.tolist())
        after = self._slots[rows[:, None], parents.cpu().numpy()]
        self._slots = np.broadcast_to(self._tree.slots + np.arange(width), after.shape)
        return self._backbone.logits(self._tree.extend(tokens.cpu().numpy(), after).flatten(0, 1))


class RowBeams:
    """Each beam in a row of its own, its prompt's keys and values among it.

    Args:
        backbone: The model's backbone.
        generation: The model's open caches, empty.
        prompts: B token sequences.
    """

    def __init__(self, backbone: CausalLM, generation: Generation, prompts: Sequence[Sequence[int]]) -> None:
        self._backbone, self._generation, self._prompts = backbone, generation, prompts
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
        self._generation.reorder(rows)
        self._mask = torch.cat([self._mask[rows], self._mask.new_ones(len(rows), 1)], dim=1)
        return self._run(tokens.reshape(-1, 1))

    def _run(self, tokens: Tensor) -> Tensor:
        positions = _positions(self._mask)[:, -tokens.shape[1] :]
        call = StageCall(attention_mask=self._mask, position_ids=positions)
        return self._backbone.logits(self._generation.decode(tokens, call)[:, -1])


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
