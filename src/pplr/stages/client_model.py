"""The model as one client sees it: its own two stages with its adapter, and between them a way to the middle one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pplr.backbones.adapters import AdapterState, adapter_sha256, natural_order
from pplr.backbones.base import Batch
from pplr.config import TrainingConfig
from pplr.errors import ConfigError, TransportError
from pplr.stages.boundary import Crossing, Guard
from pplr.stages.generation import Generation, Openings
from pplr.stages.joint_optimizer import JointOptimizer
from pplr.stages.optimizer import LocalObjective
from pplr.stages.pipeline import Ends, MicroBatch, train_overlapped
from pplr.stages.stage import Member, Stage, StageCall
from pplr.stages.transport import KeepingTransport, LocalTransport, TakingTransport, Traffic, Transport

__all__ = ["ClientModel"]

_SETTLED_TOKENS = 64
"""Histories are computed in a multiple of this length where the input stage has settled."""


class ClientModel:
    """One client's model: embeddings, input stage, transport, output stage, and its adapter in all of them.

    Args:
        input_stage: The first blocks, shared by the clients of a process.
        output_stage: The last blocks, shared likewise.
        transport: The way to the middle blocks; ``None`` when the model is not cut.
        initial: The adapter to start from.
        training: The optimizer's settings.
        in_flight: Micro-batches of a batch under way at once, where a transport leaves the process.
        guard: What is done to states and gradients before they cross; nothing when absent.
        rate_weight: β, of a learned code's rate beside the loss.
    """

    def __init__(
        self,
        input_stage: Stage,
        output_stage: Stage,
        transport: Transport | None,
        initial: Mapping[str, Tensor],
        training: TrainingConfig,
        in_flight: int = 1,
        guard: Guard | None = None,
        rate_weight: float = 0.0,
    ) -> None:
        self.backbone = input_stage.backbone
        self.transport = transport
        self.guard = guard
        self._rate_weight = rate_weight
        self._stages = (input_stage, output_stage)
        self._members = (Member(input_stage, initial, training), Member(output_stage, initial, training))
        self.optimizer = JointOptimizer([member.optimizer for member in self._members], transport)
        self._step = 0
        self._in_flight = in_flight
        self.keeps_constants = False
        self.has_settled = guard is not None and guard.settle_rounds is not None
        self._constants_are_old = self._lacks_constants(initial)
        self.openings = Openings(self._open, self._version)

    def settle(self, server_round: int) -> None:
        """Enter a server round: say whether the input stage stays as it is, as it does outside of training.

        From then on every history crosses by itself, without dropout, so that it crosses as the same bytes whatever it
        is batched with; and the input stage's tensors change no more, whoever sets an adapter.
        """
        rounds = None if self.guard is None else self.guard.settle_rounds
        self.has_settled = rounds is not None and server_round >= rounds

    def _lacks_constants(self, state: Mapping[str, Tensor]) -> bool:
        """Tell whether the backbone's constants must be computed before they can be used with a state."""
        names = self.backbone.constant
        return bool(names) and not all(name in state and bool(state[name].any()) for name in names)

    def refresh(self) -> None:
        """Compute the backbone's constant tensors anew if the adapter has changed since, unless they are to be kept."""
        if not self._constants_are_old or self.keeps_constants:
            return
        trained = {name: tensor for name, tensor in self.adapter().items() if name not in self.backbone.constant}
        fresh = self.backbone.constants(partial(self.hidden_states, public=True), adapter_sha256(trained))
        for member in self._members:
            member.set_adapter(fresh)
        self._constants_are_old = False

    @property
    def traffic(self) -> Traffic:
        """What crossed the cut so far."""
        return Traffic() if self.transport is None else self.transport.traffic.reading()

    @property
    def input_member(self) -> Member:
        """What is trained in the input stage."""
        return self._members[0]

    @property
    def output_end(self) -> Mapping[str, Tensor]:
        """What is trained outside the blocks at the output end."""
        return self._members[1].ends

    # -- whole sequences --------------------------------------------------------------------------------------

    def train_loss(self, batch: Batch, dropout_seed: int | None) -> Tensor:
        """Sum the loss over a batch's targets, ready for ``backward``, which crosses the cut again.

        Args:
            batch: Padded on the right, or in one row.
            dropout_seed: Seed of this pass's dropout masks; ``None`` drops nothing.

        Returns:
            (). A learned code's rate has its weight in the gradient and no part in the value.
        """
        part = self._numbered(batch, dropout_seed)
        states, rate = self._entered(part)
        if self.transport is not None:
            call = replace(part.call, gradient_wanted=states.requires_grad)
            if not states.requires_grad:  # so that the middle stage is trained all the same
                states = states.detach().requires_grad_(True)
            scales: list[Tensor] = []
            outgoing = partial(self._guarded_gradient, batch.lengths, scales)
            states = Crossing.apply(states, batch.lengths, self.transport, call, part.step, outgoing)
            loss = self._leave(states, part)
            if self.guard is not None:
                loss.register_hook(scales.append)
            return loss if rate is None else loss + self._rate_weight * (rate - rate.detach())
        return self._leave(states, part)

    def _numbered(self, batch: Batch, dropout_seed: int | None) -> MicroBatch:
        self._step += self.transport is not None
        call = StageCall(dropout_seed=dropout_seed, lengths=batch.lengths, row=batch.row)
        return MicroBatch(batch, call, self._step)

    def _enter(self, part: MicroBatch) -> Tensor:
        """Embed a batch, run the input stage, and guard what is to cross: (B, T) -> (B, T, D)."""
        return self._entered(part)[0]

    def _entered(self, part: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Do the same, and sum the rate of the batch's codes where there are any and they are trained."""
        if self.has_settled and self.transport is not None:
            return self._settled(part.batch), None
        states = self.backbone.embed(part.batch.input_ids, self._members[0].ends, part.call.dropout_seed)
        states = self._stages[0].run(self._members[0], states, part.call)
        if self.transport is None:
            return states, None
        rate, bottleneck, lengths = None, self._stages[0].bottleneck, part.batch.lengths
        if bottleneck is not None:
            trained = self._members[0].ends
            is_real = (torch.arange(states.shape[1])[None, :] < lengths[:, None].cpu()).to(states.device)
            rate = bottleneck.rate(bottleneck.mean(states, trained), trained)[is_real].sum()
        return self._guarded(states, part.batch), rate

    @torch.no_grad()
    def _settled(self, batch: Batch) -> Tensor:
        """Send each row by itself, as it was sent before: (B, T) -> (B, T, D).

        It is computed in a length that does not depend on its own but in steps, and without a mask, as blocks look
        back only: so of two histories that begin alike the states of what they share have the same bits.
        """
        rows = []
        owners = [-1] * batch.samples if batch.owners is None else batch.owners.tolist()
        for place, (length, owner) in enumerate(zip(batch.lengths.tolist(), owners, strict=True)):
            own = Batch(
                batch.input_ids[place : place + 1, :length],
                batch.lengths[place : place + 1],
                batch.is_target[place : place + 1, :length],
            )
            padded = functional.pad(own.input_ids, (0, -length % _SETTLED_TOKENS))
            states = self.backbone.embed(padded, self._members[0].ends)
            call = StageCall(lengths=torch.tensor([padded.shape[1]]))
            states = self._stages[0].run(self._members[0], states, call)
            with nullcontext() if self.guard is None or owner < 0 else self.guard.repeating(owner):
                rows.append(self._guarded(states, own)[0, :length])
        return pad_sequence(rows, batch_first=True)

    def _leave(self, states: Tensor, part: MicroBatch) -> Tensor:
        """Run the output stage and sum the loss: (B, T, D) -> ()."""
        states = self._stages[1].run(self._members[1], states, part.call)
        return self.backbone.loss(states, part.batch, self._members[1].ends)

    def train_batch(self, parts: Sequence[Batch], dropout_seeds: Sequence[int | None]) -> list[float]:
        """Add up the gradients of a batch's micro-batches; its loss is the mean over the targets of all.

        Across a network some are in flight at a time, if the model was made so; the result has the same bits.

        Args:
            parts: The micro-batches, in their order.
            dropout_seeds: One for each.

        Returns:
            Each micro-batch's sum of losses.
        """
        wanted = sum(part.targets for part in parts)
        transport = None if isinstance(self.transport, LocalTransport) else self.transport
        if self._in_flight > 1 and len(parts) > 1 and transport is not None:
            numbered = [self._numbered(part, seed) for part, seed in zip(parts, dropout_seeds, strict=True)]
            scales = [torch.ones(()) / wanted]  # as a backward pass through the mean scales it
            ends = Ends(
                self._enter,
                self._leave,
                lambda gradient, part: self._guarded_gradient(part.batch.lengths, scales, gradient),
            )
            return train_overlapped(ends, transport, numbered, lambda loss: loss / wanted, self._in_flight)
        losses = []
        for part, seed in zip(parts, dropout_seeds, strict=True):
            loss = self.train_loss(part, seed)
            (loss / wanted).backward()
            losses.append(float(loss.detach()))
        return losses

    def _guarded(self, states: Tensor, batch: Batch | None = None, *, public: bool = False) -> Tensor:
        """Make of states what crosses: codes and their noise where they are learned, and what the guard does."""
        bottleneck, trained = self._stages[0].bottleneck, self._members[0].ends
        if bottleneck is None and self.guard is None:
            return states
        if batch is not None and batch.row is not None:
            raise ConfigError(
                "a guard of what crosses the cut, and samples in one row: a gradient that several users share is not "
                "what its promise is of",
                cure="Set training.shared_prefix: false.",
            )
        lengths = None if batch is None else batch.lengths
        if bottleneck is not None:
            code = bottleneck.mean(states, trained)
            if self.guard is not None:
                code = code + bottleneck.deviations(trained) * self.guard.normal(code, lengths, public=public)
            states = bottleneck.expand(code, trained).to(states.dtype)
        return states if self.guard is None else self.guard.states(states, lengths, public=public)

    def _guarded_gradient(self, lengths: Tensor, scales: Sequence[Tensor], gradient: Tensor) -> Tensor:
        """Guard a gradient by how much the summed loss was scaled, which its own gradient says."""
        return gradient if self.guard is None else self.guard.gradient(gradient, lengths, float(scales[-1]))

    @torch.no_grad()
    def hidden_states(self, batch: Batch, *, adapter: bool = True, public: bool = False) -> Tensor:
        """Run a batch without keeping anything: (B, T) -> (B, T, D), before the final norm.

        Args:
            batch: Padded on the right, or in one row.
            adapter: Whether the adapter takes part; without it these are the base model's states.
            public: Whether the batch holds nothing of a user.
        """
        call = StageCall(adapter=adapter, lengths=batch.lengths, row=batch.row)
        if self.has_settled and self.transport is not None and adapter and not public:
            states = self._settled(batch)
        else:
            states = self.backbone.embed(batch.input_ids, self._members[0].ends)
            states = self._stages[0].run(self._members[0], states, call)
            if self.transport is not None:
                states = self._guarded(states, batch, public=public)
        if self.transport is not None:
            states = self.transport.forward(states, batch.lengths, call, keep_as=None)
        return self._stages[1].run(self._members[1], states, call)

    @torch.no_grad()
    def evaluation_loss(self, batch: Batch) -> Tensor:
        """Sum the loss over a batch's targets, without gradients or dropout."""
        return self.backbone.loss(self.hidden_states(batch), batch, self._members[1].ends)

    # -- token by token ---------------------------------------------------------------------------------------

    @contextmanager
    def generation(self) -> Iterator[Generation]:
        """Open caches in every stage for one generation, and close them whatever happens."""
        generation = self._generation()
        try:
            yield generation
        finally:
            generation.close()

    def _generation(self) -> Generation:
        return Generation(self._stages, self._members, self.transport, self._guarded)

    def opening(self, tokens: Sequence[int]) -> Generation | None:
        """Return a generation of one row that holds what prompts begin with; it is run once for each adapter.

        The newest few are kept until the adapter changes. Nothing is kept across a network, nor where a guard draws
        noise for what crosses.

        Args:
            tokens: What every prompt begins with, whoever it is about.
        """
        if self.guard is not None or not tokens:
            return None
        if not (self.transport is None or isinstance(self.transport, KeepingTransport)):
            return None
        return self.openings.of(tuple(tokens))

    def _open(self, tokens: Sequence[int]) -> Generation:
        """Run one row into new caches."""
        opened, device = self._generation(), self.backbone.device
        call = StageCall(
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long, device=device),
            position_ids=torch.arange(len(tokens), device=device)[None],
        )
        opened.decode(torch.tensor([list(tokens)], device=device), call)
        return opened

    def _version(self) -> tuple[int, ...]:
        """Number the state of every stage's adapter."""
        own = [member.version for member in self._members]
        return (*own, self.transport.adapter_version()) if isinstance(self.transport, KeepingTransport) else tuple(own)

    # -- optimizer, over all stages together ------------------------------------------------------------------

    def begin_round(
        self, total_steps: int, objective: LocalObjective | None = None, anchor: AdapterState | None = None
    ) -> None:
        """Prepare a round of local training; see :class:`~pplr.stages.optimizer.StageOptimizer`."""
        self.openings.close()
        self.optimizer.begin_round(total_steps, objective or LocalObjective(), anchor)
        if self.has_settled:
            for parameter in self._members[0].parameters.values():
                parameter.requires_grad_(False)

    def optimizer_step(self, clip_norm: float | None) -> float:
        """Clip by the global norm over all stages and step each of them once.

        Returns:
            The gradient norm before clipping.
        """
        norm = self.optimizer.step(clip_norm)
        self._constants_are_old = bool(self.backbone.constant)
        return norm

    def end_round(self) -> None:
        """Let go of what only the round needed."""
        self.optimizer.end_round()

    # -- state ------------------------------------------------------------------------------------------------

    def adapter(self) -> AdapterState:
        """Return the LoRA tensors of all stages in natural order, without copying those of this process."""
        state = self.own_adapter()
        if self.transport is not None:
            state |= self.transport.adapter()
        return {name: state[name] for name in natural_order(state)}

    def own_adapter(self) -> AdapterState:
        """Return the tensors of this process's own stages alone, in natural order, without copying."""
        state = {name: tensor for member in self._members for name, tensor in member.adapter().items()}
        return {name: state[name] for name in natural_order(state)}

    def take_adapter(self, label: str) -> None:
        """Have the middle adapter become the one that is offered on the server under a label.

        Raises:
            TransportError: Nothing is offered there, or the middle stage is not on a server.
        """
        if not isinstance(self.transport, TakingTransport):
            raise TransportError(
                "this client's middle blocks are on no stage server",
                cure="Use the same configuration and the same stage server on both sides.",
            )
        self.transport.take_adapter(label)
        self._constants_are_old = bool(self.backbone.constant)

    def set_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Copy LoRA tensors into all stages, or into none; into an input stage that has settled never.

        Raises:
            AdapterError: One of them does not fit, or is not finite.
        """
        for member in self._members:
            member.check(state, whose="the adapter to go on with")
        self.openings.close()
        if self.transport is not None:
            self.transport.set_adapter(state)
        for member in self._members[1:] if self.has_settled else self._members:
            member.set_adapter(state)
        self._constants_are_old = self._lacks_constants(state)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state of all stages as flat tensors."""
        return self.optimizer.state()

    def restore_optimizer(self, flat: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`optimizer_state` returned.

        Raises:
            CheckpointError: It has no step count.
        """
        self.optimizer.restore(flat)
