"""The attacker's own copy of the client's stages, by what it knows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.backbones.base import Backbone
from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.config import AdapterConfig, StatePrivacyConfig, TrainingConfig
from pplr.stages.bottleneck import Bottleneck
from pplr.stages.boundary import Guard
from pplr.stages.cut import CutPlan
from pplr.stages.stage import Member, Stage, StageCall

__all__ = ["Replica"]

_ROWS = 512
"""Candidates that run at once."""
_TIERS = (16, 128, 512)
"""How many of the most promising candidates run first, and then."""
_SURE = 0.01
"""The distance, as a share of the state's length, at which no further candidates run: about what rounding leaves."""


class Replica:
    """Embeddings, input stage and output stage with an adapter that the attacker has.

    Args:
        backbone: The public base.
        plan: The cut.
        config: LoRA's settings.
        adapter: What the attacker has: the client's own adapter, another's, or the initial one.
        clip: What the client does to states without drawing anything, which the attacker does to its candidates' too.
        states: What is done to what crosses, of which a learned code is a part of the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        plan: CutPlan,
        config: AdapterConfig,
        adapter: AdapterState,
        clip: Callable[[Tensor], Tensor] = lambda states: states,
        states: StatePrivacyConfig | None = None,
    ) -> None:
        self._clip = clip
        self.backbone = backbone
        self.plan = plan
        bottleneck = Bottleneck.of(states, plan, backbone.hidden_size)
        self._input = Stage(backbone, plan.input, config, "input", bottleneck=bottleneck)
        self._output = Stage(backbone, plan.output, config, "output")
        training = TrainingConfig()
        self._first = Member(self._input, adapter, training)
        self._last = Member(self._output, adapter, training)

    @property
    def output_ends(self) -> Mapping[str, Tensor]:
        """What is trained at the output end."""
        return self._last.ends

    @torch.no_grad()
    def embeddings(self, tokens: Tensor) -> Tensor:
        """Look up what enters the first block: (M,) -> (M, D) float32."""
        return self.backbone.embed(tokens[None].to(self.backbone.device), self._first.ends)[0].float()

    @torch.no_grad()
    def states(self, rows: Tensor) -> Tensor:
        """Run tokens up to the first cut, to what crosses before it is clipped, without noise: (B, T) -> (B, T, D)."""
        return self._sent(self._entered(rows))

    def crossing(self, rows: Tensor) -> Tensor:
        """Run tokens to what crosses, but for noise: (B, T) -> (B, T, D) float32."""
        return self._clip(self.states(rows))

    def code_noise(self, states: Tensor, guard: Guard) -> Tensor:
        """Draw the noise of learned codes as it crosses, for states without it; zeros where none is learned."""
        bottleneck, trained = self._input.bottleneck, self._first.ends
        if bottleneck is None:
            return torch.zeros_like(states)
        normal = guard.normal(states.new_zeros(*states.shape[:-1], bottleneck.width))
        return bottleneck.expand(bottleneck.deviations(trained) * normal, trained).detach()

    def _entered(self, rows: Tensor) -> Tensor:
        entering = self.backbone.embed(rows.to(self.backbone.device), self._first.ends)
        return self._input.run(self._first, entering, StageCall()).float()

    def _sent(self, states: Tensor) -> Tensor:
        """Make codes of states, and what crosses of codes, where they are learned."""
        bottleneck, trained = self._input.bottleneck, self._first.ends
        return states if bottleneck is None else bottleneck.expand(bottleneck.mean(states, trained), trained)

    def leave(self, states: Tensor, past: Tensor | None = None) -> Tensor:
        """Run states of the second cut through the output stage, with gradients if wanted.

        Args:
            states: (B, T, D).
            past: (T_past, D), what came before in every row, of which no gradient is wanted.

        Returns:
            (B, T, D).
        """
        states = states.to(device=self.backbone.device, dtype=self.backbone.dtype)
        if past is None or len(past) == 0 or len(self.plan.output) == 0:
            return self._output.run(self._last, states, StageCall())
        cache = self.backbone.new_cache(self._output.blocks)
        with torch.no_grad():
            self._output.run(self._last, past[None].to(states), StageCall(), cache)
        cache.batch_repeat_interleave(len(states))
        position_ids = torch.arange(len(past), len(past) + states.shape[1], device=states.device)[None]
        call = StageCall(position_ids=position_ids.expand(len(states), -1))
        return self._output.run(self._last, states, call, cache)

    def vocabulary(self) -> Tensor:
        """List everything that a token may be: (V,)."""
        if isinstance(self.backbone, ItemVectors):
            return torch.arange(len(self.backbone.vectors))
        if isinstance(self.backbone, CausalLM):
            return torch.arange(self.backbone.model.get_input_embeddings().weight.shape[0])
        raise TypeError(type(self.backbone).__name__)

    @torch.no_grad()
    def walk(
        self, seen: Tensor, known: Sequence[int | None], propose: Callable[[int, tuple[int, ...]], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Recover tokens from left to right: try candidates at one position, and go on from the nearest.

        A decoder's state depends on what came before alone, so what was recovered is run once and kept.

        Args:
            seen: (T, D), states at the first cut.
            known: T tokens, ``None`` where one is to be recovered.
            propose: Gives the candidates of a position, after the tokens before it, the most promising first: (S,).

        Yields:
            Of each position the candidates that were run, nearest first, and their distances. They run in tiers,
            the promising ones first, until one is as near as rounding leaves the right one.
        """
        cache = self.backbone.new_cache(self._input.blocks) if len(self.plan.input) else None
        found: list[int] = []
        waiting: list[int] = []
        for position, token in enumerate(known):
            if token is not None:
                waiting.append(token)
                found.append(token)
                yield torch.tensor([token]), torch.zeros(1)
                continue
            if waiting and cache is not None:
                self._extend(torch.tensor([waiting]), len(found) - len(waiting), cache)
            waiting = []
            candidates = propose(position, tuple(found))
            distances = torch.empty(0)
            for start, end in pairwise((0, *_TIERS, max(len(candidates), *_TIERS) + 1)):
                some = candidates[start:end]
                if len(some) and not bool((distances <= _SURE * float(seen[position].norm())).any()):
                    distances = torch.cat([distances, self._distances(some, seen[position], len(found), cache)])
            candidates = candidates[: len(distances)]
            order = distances.argsort(stable=True).cpu()
            found.append(int(candidates[order[0]]))
            waiting = [found[-1]]
            yield candidates[order], distances[order]

    def _distances(self, candidates: Tensor, seen: Tensor, past: int, cache: object) -> Tensor:
        states = self._clip(self._sent(self._try(candidates, past, cache)))
        return (states - seen.to(states)).norm(dim=-1).cpu()

    def _extend(self, rows: Tensor, past: int, cache: object) -> Tensor:
        entering = self.backbone.embed(rows.to(self.backbone.device), self._first.ends)
        position_ids = torch.arange(past, past + rows.shape[1], device=entering.device)[None].expand(len(rows), -1)
        return self._input.run(self._first, entering, StageCall(position_ids=position_ids), cache).float()

    def _try(self, candidates: Tensor, past: int, cache: object) -> Tensor:
        """Run candidates after what a cache holds, which stays as it is: (S,) -> (S, D)."""
        if cache is None:
            return self.embeddings(candidates)
        parts = []
        for part in candidates.split(_ROWS):
            if past == 0:
                parts.append(self._entered(part[:, None])[:, -1])
                continue
            cache.batch_repeat_interleave(len(part))  # type: ignore[attr-defined]
            parts.append(self._extend(part[:, None], past, cache)[:, -1])
            cache.crop(-1)  # type: ignore[attr-defined]
            cache.reorder_cache(torch.zeros(1, dtype=torch.long, device=parts[-1].device))  # type: ignore[attr-defined]
        return torch.cat(parts)
