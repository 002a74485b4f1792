"""A stage: a span of shared frozen blocks, in which one client's adapter is put at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pplr.backbones.adapters import AdapterState, check_adapter
from pplr.backbones.attention import Part, batches
from pplr.backbones.base import Backbone, End
from pplr.backbones.shared_row import SharedRow
from pplr.backbones.slots import AdapterSlots, Slots, Tenant, make_slots
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import BackboneError, TransportError
from pplr.stages.bottleneck import Bottleneck
from pplr.stages.optimizer import StageOptimizer

__all__ = ["Member", "Stage", "StageCall"]


@dataclass(frozen=True)
class StageCall:
    """How a stage is to be run, apart from its hidden states.

    Args:
        attention_mask: (B, T_past + T), 0 where a token is padding; absent when padding is on the right only. Or
            (B, 1, T, T_past + T), whether each of T new tokens sees each token.
        position_ids: (B, T); absent counts from 0.
        dropout_seed: Seed of this pass's dropout masks; absent is evaluation.
        adapter: Whether the adapter takes part; without it the stage is the base model's.
        lengths: (B,) real tokens of each row, which blocks that look ahead must know; what follows is padding. With a
            mask for each new token: the real ones of them; what comes before is padding.
        row: How sequences stand in one row of tokens, where they do; B is 1 then, and there is neither a mask nor
            positions.
        gradient_wanted: Whether, after a training pass, the gradient of what entered is of use to anyone.
    """

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    dropout_seed: int | None = None
    adapter: bool = True
    lengths: Tensor | None = None
    row: SharedRow | None = None
    gradient_wanted: bool = True

    def new_lengths(self, tokens: int) -> Tensor:
        """Count the real ones of each row's ``tokens`` newest tokens, which padding comes before: (B,).

        Raises:
            TransportError: There is no mask of the whole sequence.
        """
        mask = self.attention_mask
        if mask is not None and mask.dim() == 2:
            return mask[:, -tokens:].sum(dim=1)
        if mask is None or self.lengths is None:
            raise TransportError("decoding without an attention mask", cure="Give the mask of the whole sequence.")
        return self.lengths

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return ``attention_mask``, or that of right-padded rows of ``lengths``: (B, T), 0 where padding is."""
        if self.attention_mask is not None or self.lengths is None:
            return self.attention_mask
        return (torch.arange(tokens)[None, :] < self.lengths[:, None].cpu()).long().to(device)


class Stage:
    """A span of blocks with room for one client's LoRA tensors at a time.

    Args:
        backbone: Whose blocks.
        span: Which blocks, half-open like ``range``.
        config: LoRA's settings.
        end: Which end of the model the stage is, when it is one; then what is trained there belongs to it.
        bottleneck: What stands behind the stage's blocks at the cut, and is trained with them.
        recompute: Whether training runs each block again in the backward pass rather than keep its activations.
    """

    def __init__(
        self,
        backbone: Backbone,
        span: range,
        config: AdapterConfig,
        end: End | None = None,
        *,
        bottleneck: Bottleneck | None = None,
        recompute: bool = False,
    ) -> None:
        self.span = span
        self.end_shapes = {} if end is None else backbone.end_shapes(end)
        self.bottleneck = bottleneck
        if bottleneck is not None:
            self.end_shapes = self.end_shapes | bottleneck.shapes
        self.backbone = backbone
        self.blocks = backbone.blocks(span)
        self.slots: Slots = make_slots(self.blocks, config, backbone.block_prefix)
        self.blocks.to(backbone.device)
        self.recompute = recompute
        self._bound: Member | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trained tensor of this stage."""
        return self.slots.shapes | self.end_shapes

    def stored_bytes(self) -> int:
        """Bytes of the frozen tensors of this stage."""
        return sum(p.nbytes for name, p in self.blocks.named_parameters() if "lora_" not in name)

    @property
    def takes_rows(self) -> bool:
        """Whether sequences can stand in one row: blocks look back only, and keep them apart."""
        return self.blocks.keeps_apart and not self.backbone.bidirectional

    def run(self, member: Member, hidden_states: Tensor, call: StageCall, cache: Any = None) -> Tensor:
        """Run the blocks with one member's adapter: (B, T, D) -> (B, T, D).

        Raises:
            BackboneError: Sequences stand in one row, and the blocks do not keep them apart.
        """
        mask, positions, parts = call.attention_mask, call.position_ids, list[Part]()
        if call.row is not None:
            if not self.takes_rows:
                raise BackboneError(
                    "blocks of this model do not keep apart what stands in one row",
                    cure="Set training.shared_prefix: false.",
                )
            parts = [Part.of(call.row, hidden_states.device)]
            positions = call.row.positions().to(hidden_states.device)
            mask = torch.ones_like(positions)
        elif self.backbone.bidirectional:
            mask = call.mask(hidden_states.shape[1], hidden_states.device)

        @contextmanager
        def prepared() -> Iterator[None]:
            self._prepare(member, call)
            with batches(parts):
                yield

        with prepared(), self._recomputing(prepared, cache):
            return self.slots.run(self.blocks, hidden_states, mask, positions, cache)

    def _recomputing(
        self, prepared: Callable[[], AbstractContextManager[None]], cache: Any = None
    ) -> AbstractContextManager[None]:
        return self.blocks.recomputing(prepared) if self.recompute and cache is None else nullcontext()

    def run_row(
        self, hidden_states: Tensor, position_ids: Tensor, parts: Sequence[Part], tenants: Sequence[Tenant]
    ) -> Tensor:
        """Run several clients' batches that stand in one row of tokens: (1, N, D) -> (1, N, D).

        Args:
            hidden_states: (1, N, D), N the tokens of all, with padding.
            position_ids: (1, N), each token's place in its own sequence.
            parts: The batches, one for each client.
            tenants: The clients' adapters, in the same order.
        """
        slots = self.slots
        if not isinstance(slots, AdapterSlots):
            raise BackboneError("a stage without LoRA takes one client at a time", cure="Run one client at a time.")
        everything = torch.ones_like(position_ids)  # each part has a mask of its own

        @contextmanager
        def prepared() -> Iterator[None]:
            slots.enable(True)
            with batches(parts), slots.shared(tenants):
                yield

        with prepared(), self._recomputing(prepared):
            return slots.run(self.blocks, hidden_states, everything, position_ids, None)

    def _prepare(self, member: Member, call: StageCall) -> None:
        if self._bound is not member:
            self.slots.bind(member.parameters)
            self._bound = member
        self.slots.enable(call.adapter)
        self.slots.reseed(call.dropout_seed)


class Member:
    """One client's part of a stage: its trained tensors (LoRA, and those of its end) and their optimizer.

    Args:
        stage: The stage it belongs to.
        initial: The adapter to start from; only this stage's tensors are taken.
        training: The optimizer's settings.
    """

    def __init__(self, stage: Stage, initial: Mapping[str, Tensor], training: TrainingConfig) -> None:
        device = stage.backbone.device
        self.parameters = {
            name: nn.Parameter(initial[name].detach().to(device=device, dtype=torch.float32, copy=True))
            for name in stage.shapes
        }
        self.ends = {name: self.parameters[name] for name in stage.end_shapes}
        constant = stage.backbone.constant & self.parameters.keys()
        for name in constant:
            self.parameters[name].requires_grad_(False)
        trained = {name: parameter for name, parameter in self.parameters.items() if name not in constant}
        self.optimizer = StageOptimizer(trained, training)

    @property
    def version(self) -> int:
        """A number that grows whenever one of its tensors is written."""
        return sum(parameter._version for parameter in self.parameters.values())

    def adapter(self) -> AdapterState:
        """Return the LoRA tensors, without copying them."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def check(self, state: Mapping[str, Tensor], *, whose: str) -> None:
        """Refuse LoRA tensors that could not be copied in; tensors of other stages are passed over.

        Raises:
            AdapterError: One of them does not fit, or is not finite.
        """
        given = {name: tensor for name, tensor in state.items() if name in self.parameters}
        check_adapter(given, {name: tuple(self.parameters[name].shape) for name in given}, whose=whose)

    def set_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Copy LoRA tensors in; tensors of other stages are passed over, tensors that are not given stay."""
        with torch.no_grad():
            for name in self.parameters.keys() & state.keys():
                self.parameters[name].copy_(state[name])
