"""What every transport must do, as a class of tests to inherit."""
# ruff: noqa: S101  (a contract is made of assertions)

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.backbones.base import Batch
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.host import StageHost
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.stages.transport import Traffic, Transport
from pplr.testing.checks import refuses, same_state, take_steps
from pplr.testing.tiny import random_adapter, tiny_backbone, tiny_catalog, tiny_samples

__all__ = ["TransportContract"]


def _copy(state: Mapping[str, Tensor]) -> AdapterState:
    return {name: tensor.clone() for name, tensor in state.items()}


class TransportContract:
    """What every transport must do; inherit it, give :meth:`connect`, and pytest finds the rest."""

    adapter: ClassVar[AdapterConfig] = AdapterConfig(rank=2, dropout=0.2)
    training: ClassVar[TrainingConfig] = TrainingConfig(learning_rate=0.01, warmup_steps=1)
    plan: ClassVar[CutPlan] = CutPlan(1, 1, 4)

    def connect(self, host: StageHost, client: str) -> Transport:
        """Connect a client that ``host`` has admitted to it."""
        raise NotImplementedError

    def cut(self) -> CutModel:
        """Make a tiny model, cut by ``plan``."""
        return CutModel(tiny_backbone(), self.plan, self.adapter, self.training)

    def admit(self, cut: CutModel, client: str, start: Mapping[str, Tensor]) -> ClientModel:
        """Admit a client to the cut model's host, and give it a model that crosses by the transport under test."""
        assert cut.host is not None
        cut.host.admit(client, start)
        return ClientModel(cut.input, cut.output, self.connect(cut.host, client), start, self.training)

    def whole(self, start: Mapping[str, Tensor]) -> ClientModel:
        """Make the uncut model, which crosses nothing."""
        backbone = tiny_backbone()
        plan = CutPlan.make(None, backbone.total_layers)
        return CutModel(backbone, plan, self.adapter, self.training).client("whole", start)

    def batches(self, cut: CutModel) -> list[Batch]:
        """Collate three batches of two samples of different lengths."""
        encoded = cut.backbone.encode(tiny_samples(), tiny_catalog(), history_items=3)
        return [cut.backbone.collate(encoded[start : start + 2]) for start in (0, 2, 4)]

    def test_training_over_it_is_training_the_whole_model(self) -> None:
        """Losses, adapters and optimizer states are bitwise those of the uncut model, with dropout and clipping."""
        cut = self.cut()
        start = random_adapter(cut.shapes)
        model, whole = self.admit(cut, "one", start), self.whole(start)
        assert take_steps(model, self.batches(cut)) == take_steps(whole, self.batches(cut))
        assert same_state(model.adapter(), whole.adapter())
        assert not same_state(model.adapter(), start)
        assert same_state(model.optimizer_state(), whole.optimizer_state())

    def test_evaluation_over_it_is_that_of_the_whole_model(self) -> None:
        """States with and without the adapter are bitwise those of the uncut model."""
        cut = self.cut()
        start = random_adapter(cut.shapes)
        model, whole = self.admit(cut, "one", start), self.whole(start)
        batch = self.batches(cut)[0]
        real = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]  # what padding becomes is left open
        for adapter in (True, False):
            one, other = (own.hidden_states(batch, adapter=adapter) for own in (model, whole))
            assert torch.equal(one[real], other[real])

    def test_its_caches_are_those_of_the_whole_model(self) -> None:
        """Decoding in pieces, rows exchanged on the way as beam search does, is decoding by the uncut model."""
        cut = self.cut()
        start = random_adapter(cut.shapes)
        tokens = torch.arange(24).reshape(2, 12) * 7 % 256
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0  # padding on the left
        rows = torch.tensor([1, 0, 1])
        told = []
        for model in (self.admit(cut, "one", start), self.whole(start)):
            with model.generation() as generation:
                first = generation.decode(tokens[:, :8], _decode_call(mask[:, :8], 8))
                generation.reorder(rows)
                last = generation.decode(tokens[rows, 8:], _decode_call(mask[rows], 4))
            told.append((first[mask[:, :8] == 1], last))
        for one, other in zip(*told, strict=True):
            assert torch.equal(one, other)

    def test_rows_join_those_of_another_cache(self) -> None:
        """Rows appended to a cache go on as they do by themselves in the uncut model."""
        cut = self.cut()
        start = random_adapter(cut.shapes)
        model, whole = self.admit(cut, "one", start), self.whole(start)
        tokens = torch.arange(24).reshape(2, 12) * 7 % 256
        mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
        with model.generation() as generation, model.generation() as other:
            generation.decode(tokens[:, :8].flip(0), _decode_call(torch.ones(2, 8, dtype=torch.long), 8))
            other.decode(tokens[1:, :3], _decode_call(torch.ones(1, 3, dtype=torch.long), 3))
            generation.reorder(torch.tensor([1]))
            generation.append_rows(other, torch.tensor([0]))
            last = torch.stack([tokens[0, 8:9], tokens[1, 3:4]])
            told = generation.decode(last, _decode_call(mask, 1))
        for row, length in enumerate((9, 4)):
            ones = torch.ones(1, length, dtype=torch.long)
            with whole.generation() as generation:
                alone = generation.decode(tokens[row : row + 1, :length], _decode_call(ones, length))
            torch.testing.assert_close(told[row, -1], alone[0, -1], rtol=1e-4, atol=1e-5)

    def test_counts_what_crosses_and_no_padding(self) -> None:
        """Bytes are real tokens times D times the bytes of a number, once for each direction and pass.

        But no gradient comes back where nothing is trained before the cut.
        """
        cut = self.cut()
        model = self.admit(cut, "one", random_adapter(cut.shapes))
        batch = self.batches(cut)[0]
        state = cut.backbone.hidden_size * cut.backbone.dtype.itemsize
        assert batch.tokens < batch.input_ids.numel()
        assert model.traffic == Traffic(0, 0)
        loss = model.train_loss(batch, 0)
        assert model.traffic == Traffic(batch.tokens * state, batch.tokens * state)
        loss.backward()
        back = 2 if len(self.plan.input) > 0 else 1  # the embedding is frozen
        assert model.traffic == Traffic(2 * batch.tokens * state, back * batch.tokens * state)
        before = model.traffic
        model.evaluation_loss(batch)
        assert model.traffic.since(before) == Traffic(batch.tokens * state, batch.tokens * state)
        before = model.traffic
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        with model.generation() as generation:
            generation.decode(mask, _decode_call(mask, 5))
            longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            generation.decode(longer[:, -1:], _decode_call(longer, 1))
        assert model.traffic.since(before) == Traffic((8 + 2) * state, (8 + 2) * state)

    def test_clients_do_not_touch_each_other(self) -> None:
        """Two clients that train in turns end as when each trains alone, bitwise."""
        shapes = self.cut().shapes
        starts = {"one": random_adapter(shapes, 1), "two": random_adapter(shapes, 2)}
        alone = {}
        for name, start in starts.items():
            cut = self.cut()
            alone[name] = self.admit(cut, name, start)
            take_steps(alone[name], self.batches(cut))
        cut = self.cut()
        both = {name: self.admit(cut, name, start) for name, start in starts.items()}
        for model in both.values():
            model.begin_round(2 * 3)
        for number, batch in enumerate(self.batches(cut)):
            losses = [model.train_loss(batch, number) for model in both.values()]
            for loss in reversed(losses):
                (loss / batch.targets).backward()
            for model in both.values():
                model.optimizer_step(0.5)
        for name, model in both.items():
            assert same_state(model.adapter(), alone[name].adapter())
            assert same_state(model.optimizer_state(), alone[name].optimizer_state())
        assert not same_state(both["one"].adapter(), both["two"].adapter())

    def test_states_go_out_and_come_back(self) -> None:
        """An adapter and an optimizer that were read and written back go on bitwise."""
        cut = self.cut()
        batches = self.batches(cut)
        model = self.admit(cut, "one", random_adapter(cut.shapes))
        take_steps(model, batches)
        adapter, optimizer = _copy(model.adapter()), _copy(model.optimizer_state())
        other = self.admit(cut, "two", random_adapter(cut.shapes, 5))
        other.set_adapter(adapter)
        other.restore_optimizer(optimizer)
        assert take_steps(other, batches) == take_steps(model, batches)
        assert same_state(other.adapter(), model.adapter())
        assert not same_state(other.adapter(), adapter)

    def test_refuses_what_is_out_of_turn(self) -> None:
        """A step twice, a gradient without a pass, a closed cache: each is a :class:`~pplr.errors.TransportError`."""
        cut = self.cut()
        transport = self.admit(cut, "one", random_adapter(cut.shapes)).transport
        assert transport is not None
        states, lengths, call = torch.randn(2, 3, cut.backbone.hidden_size), torch.tensor([3, 3]), StageCall()
        with refuses(TransportError):
            transport.backward(1, states, lengths)
        transport.forward(states, lengths, call, keep_as=1)
        with refuses(TransportError):
            transport.forward(states, lengths, call, keep_as=1)
        transport.backward(1, states, lengths)
        with refuses(TransportError):
            transport.backward(1, states, lengths)
        cache = transport.open_cache()
        transport.close_cache(cache)
        for use in (
            lambda: transport.close_cache(cache),
            lambda: transport.reorder_cache(cache, torch.tensor([0])),
            lambda: transport.decode(states, call, cache),
            lambda: transport.append_rows(transport.open_cache(), cache, torch.tensor([0]), 0),
            lambda: transport.append_rows(cache, transport.open_cache(), torch.tensor([0]), 0),
        ):
            with refuses(TransportError):
                use()

    def test_discard_lets_go(self) -> None:
        """After a discard, kept passes and open caches are gone, and the step can be run anew."""
        cut = self.cut()
        transport = self.admit(cut, "one", random_adapter(cut.shapes)).transport
        assert transport is not None
        states, lengths = torch.randn(2, 3, cut.backbone.hidden_size), torch.tensor([3, 3])
        transport.forward(states, lengths, StageCall(), keep_as=1)
        cache = transport.open_cache()
        transport.discard()
        with refuses(TransportError):
            transport.backward(1, states, lengths)
        with refuses(TransportError):
            transport.close_cache(cache)
        transport.forward(states, lengths, StageCall(), keep_as=1)


def _decode_call(mask: Tensor, new: int) -> StageCall:
    return StageCall(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -new:])
