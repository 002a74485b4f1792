"""Learn to read tokens off states, on auxiliary passes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from pplr.privacy.audits.base import Attacker, Audit, Guess, Knowledge, register
from pplr.privacy.observing import Observation
from pplr.seeds import derive_seed

__all__ = ["Inverter"]

_PASSES = 400
_HELD_OUT = 8
"""One auxiliary pass in so many tells when to stop."""
_WIDTH = 256
_BATCH = 16
_RATE = 2e-3
_EPOCHS = 24
_PATIENCE = 2
_BETTER = 0.02
"""Share by which the held-out loss must fall to count as better."""
_PERFECT = 0.005
"""Held-out loss below which nothing is left to learn."""


@register
class Inverter(Audit):
    """x_t = argmax_v of a recurrent network on all of a pass's states, trained on auxiliary passes.

    It needs no weights, only pairs of text and states, so with ``own`` and with ``pairs`` it finds the same. Auxiliary
    states go the way of the client's, so it is trained on whatever noise or rounding the client uses. It says the
    tokens that occur in auxiliary text or, where the backbone reads items, the catalog's items.

    Cites:
        chen2024bisr
        morris2023text
    """

    name: ClassVar[str] = "inverter"
    by_default: ClassVar[bool] = False
    knows: ClassVar[tuple[Knowledge, ...]] = ("own", "exchanged", "mixed", "base", "pairs")

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Train once, then guess every token that is not known."""
        lead = len(attacker.prefix)
        passes = [(tokens[lead:], states[lead:]) for tokens, states in attacker.auxiliary_passes(_PASSES)]
        said = attacker.replica.vocabulary() if attacker.reads_items else torch.cat([own for own, _ in passes]).unique()
        network = _trained(
            [(torch.searchsorted(said, tokens), states) for tokens, states in passes if len(tokens)],
            len(said),
            attacker.seed,
            attacker.replica.backbone.device,
        )
        guesses = []
        for own in seen:
            if own.length <= lead:
                guesses.append(Guess(attacker.prefix[: own.length]))
                continue
            best = said[network.best(own.states[lead:])]  # (T - lead,)
            guesses.append(Guess((*attacker.prefix, *best.tolist())))
        return guesses


class _Network(nn.Module):
    """Standardise each dimension, then LayerNorm → Linear → GRU in both directions → Linear.

    Args:
        states: (M, D), whose mean and deviation are taken.
        choices: S, what a state may be read as.
    """

    def __init__(self, states: Tensor, choices: int) -> None:
        super().__init__()
        size = states.shape[1]
        width = min(_WIDTH, 4 * size)
        self.mean = nn.Buffer(states.mean(dim=0))
        self.deviation = nn.Buffer(states.std(dim=0).clamp(min=1e-6))
        self.enter = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width))
        self.recur = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(width, choices)

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Read states: (B, T, D), (B,) -> (B, T, S)."""
        entered = self.enter((states - self.mean) / self.deviation)  # (B, T, W)
        packed = pack_padded_sequence(entered, lengths, batch_first=True, enforce_sorted=False)
        recurred, _ = pad_packed_sequence(self.recur(packed)[0], batch_first=True)
        return self.leave(entered + recurred)

    @torch.no_grad()
    def best(self, states: Tensor) -> Tensor:
        """Read one pass: (T, D) -> (T,)."""
        logits = self(states[None].to(self.mean), torch.tensor([len(states)]))
        return logits[0].argmax(dim=-1).cpu()


def _trained(passes: Sequence[tuple[Tensor, Tensor]], choices: int, seed: int, device: torch.device) -> _Network:
    """Train until a held-out part of the passes is read no better."""
    held, kept = list(passes[::_HELD_OUT]), [own for place, own in enumerate(passes) if place % _HELD_OUT]
    source = torch.Generator().manual_seed(derive_seed(seed, "inverter", "batches"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "inverter"))
        network = _Network(torch.cat([states for _, states in kept]), choices).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    best, since, state = float("inf"), 0, copy.deepcopy(network.state_dict())
    for _ in range(_EPOCHS):
        for places in torch.randperm(len(kept), generator=source).split(_BATCH):
            optimizer.zero_grad()
            _loss(network, [kept[place] for place in places.tolist()]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            told = float(_loss(network, held))
        since = 0 if told < best * (1 - _BETTER) else since + 1
        if told < best:
            best, state = told, copy.deepcopy(network.state_dict())
        if since == _PATIENCE or best < _PERFECT:
            break
    network.load_state_dict(state)
    return network


def _loss(network: _Network, passes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Average the cross-entropy over the tokens of some passes."""
    lengths = torch.tensor([len(tokens) for tokens, _ in passes])
    labels = pad_sequence([tokens for tokens, _ in passes], batch_first=True, padding_value=-100)
    states = pad_sequence([states for _, states in passes], batch_first=True)
    logits = network(states.to(network.mean), lengths)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device))
