"""Attackers of a run: what each level of knowledge means there, and what they do to states of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.backbones.base import Backbone
from pplr.backbones.causal_lm import CausalLM
from pplr.config import StatePrivacyConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample
from pplr.privacy.audits import PAIRS, Attacker, Knowledge
from pplr.privacy.replica import Replica
from pplr.privacy.states import StateGuard, clipped
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.recommending import saved_adapter
from pplr.runtimes.run import Run
from pplr.seeds import generator
from pplr.stages.cut import CutPlan

__all__ = ["Attackers", "auxiliary_rows", "rounded", "saved_adapters"]


def saved_adapters(run: Run, parts: Assembly) -> dict[str, AdapterState]:
    """Read every client's adapter of a finished run.

    Raises:
        AdapterError: One is missing, or does not fit the model.
    """
    return {name: saved_adapter(run, parts, name) for name in parts.data.partition.names}


class Attackers:
    """Makes attackers on the clients of a run.

    Args:
        assembly: The parts of the run.
        adapters: Each client's, by name.
        seed: Of what attackers draw.
    """

    def __init__(self, assembly: Assembly, adapters: Mapping[str, AdapterState], seed: int) -> None:
        self.assembly, self.adapters, self.seed = assembly, adapters, seed
        self.backbone, self.data = assembly.backbone, assembly.data
        self.catalog = self.data.dataset.catalog
        taken = np.zeros(len(self.catalog), dtype=np.int64)
        for own in self.data.holdout.train:
            np.add.at(taken, own, 1)
        self.popularity = torch.from_numpy(taken)

    @property
    def keeps_some_at_home(self) -> bool:
        """Whether clients keep some of their adapters to themselves, so that nobody else has one whole."""
        return bool(self.backbone.private - self.backbone.constant)

    def make(
        self,
        level: Knowledge,
        client: str,
        plan: CutPlan,
        states: StatePrivacyConfig,
        through: Callable[[Tensor], Tensor] = lambda states: states,
        passes: int = 1,
        seconds: float | None = None,
        pairs: int = PAIRS,
    ) -> Attacker:
        """Make an attacker on one client.

        Args:
            level: What it has.
            client: Whom it attacks.
            plan: Where the model is cut.
            states: What clients do to what they send, as the attacker knows.
            through: What becomes of states on their way.
            passes: How often each pass crossed.
            seconds: How long it may take for a pass; no limit when absent.
            pairs: Passes of public text whose states it has, at the level ``pairs``.
        """
        guard = self.guard(states, f"{level} attacker of {client}")
        config, known = self.assembly.config, self._known(level, client)
        replica = Replica(self.backbone, plan, config.adapter, known, _clip(guard), config.privacy.states)
        return Attacker(
            knowledge=level,
            replica=replica,
            catalog=self.catalog,
            popularity=self.popularity,
            auxiliary=self.auxiliary,
            prefix=self._prefix(),
            through=_repeated(through, guard, passes, replica),
            clip_gradients=partial(clipped, clip_norm=states.gradient_clip_norm),
            seed=self.seed,
            seconds=seconds,
            pairs=pairs,
        )

    def guard(self, states: StatePrivacyConfig, whose: str) -> StateGuard | None:
        """Make a guard with noise by the seed: nobody's secret is needed to attack a run."""
        secret = sha256(f"audit {self.seed}".encode()).digest()
        return StateGuard(states, secret, whose) if states.is_on else None

    def _known(self, level: Knowledge, client: str) -> AdapterState:
        if level in ("own", "pairs"):
            return self.adapters[client]
        if level in ("base", "catalog"):
            return self.assembly.initial
        if level == "exchanged":
            return self.assembly.initial | self.assembly.exchanged(self.adapters[client])
        others = [self.assembly.exchanged(own) for name, own in self.adapters.items() if name != client]
        mean = {name: torch.stack([own[name] for own in others]).mean(dim=0) for name in others[0]}
        return self.assembly.initial | mean

    def _prefix(self) -> tuple[int, ...]:
        """Tokens with which every prompt begins, up to the first title's quote."""
        if not isinstance(self.backbone, CausalLM):
            return ()
        prompts = (self.backbone.prompt_tokens([title], 0) for title in ("A", "z9"))
        return tuple(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False)))

    def auxiliary(self, passes: int, seed: int) -> list[tuple[int, ...]]:
        """Draw passes of public text."""
        most = self.assembly.config.data.history_items
        return auxiliary_rows(self.backbone, self.catalog, self.popularity, most, passes, seed)


def auxiliary_rows(
    backbone: Backbone, catalog: Catalog, popularity: Tensor, history_items: int, passes: int, seed: int
) -> list[tuple[int, ...]]:
    """Draw passes of public text: rows of items, taken partly by popularity and partly evenly, as users do."""
    draw = generator(seed, "auxiliary")
    weights = popularity.numpy() + popularity.numpy().mean() + 1e-9
    longest = history_items + 1
    rows: list[tuple[int, ...]] = []
    for number in range(passes):
        count = int(draw.integers(min(2, longest), longest + 1))
        items = draw.choice(len(weights), count, replace=count > len(weights), p=weights / weights.sum()).tolist()
        sample = Sample(-1 - number, tuple(items[:-1]), items[-1], every=True)
        (encoded,) = backbone.encode([sample], catalog, longest)
        rows.append((*encoded.prompt, *encoded.answer) if isinstance(backbone, CausalLM) else encoded.items)
    return rows


def _clip(guard: StateGuard | None) -> Callable[[Tensor], Tensor]:
    return guard.clip if guard is not None else lambda states: states


def _repeated(
    through: Callable[[Tensor], Tensor], guard: StateGuard | None, passes: int, replica: Replica
) -> Callable[[Tensor], Tensor]:
    """Do to an attacker's own states what becomes of the client's: the mean of several passes, each guarded anew."""

    def once(states: Tensor) -> Tensor:
        return through(states if guard is None else guard.states(states + replica.code_noise(states, guard)))

    def changed(states: Tensor) -> Tensor:
        return torch.stack([once(states) for _ in range(passes)]).mean(dim=0)

    return changed


def rounded(states: Tensor, wire: str) -> Tensor:
    """Round states as a wire format does."""
    if wire == "exact":
        return states
    from pplr.runtimes import codec  # the network is an extra

    own = states if states.dim() == 3 else states[None]
    lengths = torch.full((len(own),), own.shape[1])
    limits = codec.Limits(width=own.shape[2])
    message = codec.encode_states(own, lengths, codec.Wire[wire.upper()])
    return codec.decode_states(message, limits, dtype=states.dtype, device=states.device)[0].view(states.shape)
