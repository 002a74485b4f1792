"""What every backbone must do, as a class of tests to inherit."""
# ruff: noqa: S101  (a contract is made of assertions)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pplr.backbones.base import BACKBONES, Backbone
from pplr.config import AdapterConfig, TrainingConfig
from pplr.stages.cut import CutPlan
from pplr.stages.flops import FlopsOfCut
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.testing.checks import counted_operations, same_state, take_steps
from pplr.testing.tiny import every_cut, random_adapter, tiny_catalog, tiny_samples

__all__ = ["BackboneContract"]


def _kept_bytes(cut: CutModel, start: Mapping[str, Tensor]) -> int:
    """Count the bytes of activations that the middle stage keeps of a training pass."""
    assert cut.host is not None
    cut.host.admit("kept", start)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    call = StageCall(dropout_seed=1, lengths=torch.tensor([12, 9]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cut.host.forward("kept", torch.randn(2, 12, cut.backbone.hidden_size), call, keep_as=1)
    cut.host.discard("kept")
    return sum(kept.values())


class BackboneContract:
    """What every backbone must do; inherit it, give :meth:`make`, and pytest finds the rest.

    Example:
        >>> from pplr.testing import tiny_backbone
        >>> class TestTinyLlama(BackboneContract):
        ...     def make(self):
        ...         return tiny_backbone("llama")
        >>> TestTinyLlama().test_every_cut_trains_as_the_whole_model()
    """

    adapter: ClassVar[AdapterConfig] = AdapterConfig(rank=2, dropout=0.2)
    """LoRA's settings; the target modules must be names of the backbone's linear layers."""

    training: ClassVar[TrainingConfig] = TrainingConfig(learning_rate=0.01, warmup_steps=1, weight_decay=0.1)

    def make(self) -> Backbone:
        """Make a tiny backbone in float32, the same at each call."""
        raise NotImplementedError

    def encoded(self, backbone: Backbone) -> list[Any]:
        """Encode six samples of different lengths."""
        return backbone.encode(tiny_samples(), tiny_catalog(), history_items=3)

    def cut(self, backbone: Backbone, plan: CutPlan) -> CutModel:
        """Cut the backbone, with this contract's settings."""
        return CutModel(backbone, plan, self.adapter, self.training)

    def whole(self, backbone: Backbone) -> CutModel:
        """Make the uncut model."""
        return self.cut(backbone, CutPlan.make(None, backbone.total_layers))

    def test_is_registered_by_its_name(self) -> None:
        """A configuration can ask for it."""
        backbone = self.make()
        assert BACKBONES[backbone.name] is type(backbone)

    def test_spans_share_the_frozen_tensors(self) -> None:
        """Any number of stages cost no second copy of the base, and nothing of it is trained."""
        backbone = self.make()
        spans = [range(backbone.total_layers), range(1, backbone.total_layers), range(1, backbone.total_layers)]
        places = [{p.data_ptr() for p in backbone.blocks(span).parameters()} for span in spans]
        assert places[1] == places[2]
        assert places[1] < places[0]
        assert not any(p.requires_grad for p in backbone.blocks(spans[0]).parameters())

    def test_every_cut_trains_as_the_whole_model(self) -> None:
        """Losses and adapters of some clipped steps are bitwise those of the uncut model, with dropout."""
        backbone = self.make()
        encoded = self.encoded(backbone)
        batches = [backbone.collate(encoded[start : start + 2]) for start in range(0, len(encoded), 2)]
        whole = self.whole(backbone)
        start = random_adapter(whole.shapes)
        model = whole.client("whole", start)
        expected = take_steps(model, batches)
        assert not same_state(model.adapter(), start)
        for plan in every_cut(backbone.total_layers)[:-1]:
            cut = self.cut(backbone, plan).client("cut", start)
            assert take_steps(cut, batches) == expected, plan
            assert same_state(cut.adapter(), model.adapter()), plan

    def test_recomputing_changes_no_bit(self) -> None:
        """Blocks of all stages that run again in the backward pass give the same losses and adapters, and keep less.

        Clients alternate meanwhile.
        """
        backbone = self.make()
        batches = [backbone.collate(self.encoded(backbone)[:4])]
        plan = CutPlan(1, 1, backbone.total_layers)
        lean = CutModel(backbone, plan, self.adapter, self.training.model_copy(update={"recompute": True}))
        start, other = random_adapter(lean.shapes), random_adapter(lean.shapes, seed=1)
        expected = self.cut(backbone, plan).client("plain", start)
        losses = take_steps(expected, batches)
        model, another = lean.client("one", start), lean.client("another", other)
        model.begin_round(2)
        loss = model.train_loss(batches[0], 0)
        another.hidden_states(batches[0])  # binds its adapter to the blocks, and turns dropout off
        (loss / batches[0].targets).backward()
        model.optimizer_step(0.5)
        model.end_round()
        assert [float(loss.detach())] == losses
        assert same_state(model.adapter(), expected.adapter())
        assert _kept_bytes(lean, start) < 0.7 * _kept_bytes(self.cut(backbone, plan), start)

    def test_padding_changes_nothing(self) -> None:
        """A batch's loss is the sum of its samples' losses, each run alone."""
        backbone = self.make()
        encoded = self.encoded(backbone)
        whole = self.whole(backbone)
        model = whole.client("one", random_adapter(whole.shapes))
        together = model.evaluation_loss(backbone.collate(encoded))
        alone = [model.evaluation_loss(backbone.collate([sample])) for sample in encoded]
        torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)
        batch = backbone.collate(encoded)
        assert batch.lengths.tolist() == [backbone.length(sample) for sample in encoded]
        assert batch.samples == len(encoded)
        assert batch.tokens == sum(map(backbone.length, encoded))
        assert batch.targets == sum(backbone.collate([sample]).targets for sample in encoded) > 0

    def test_without_its_adapter_it_is_the_base_model(self) -> None:
        """Whatever the adapter holds, switching it off gives what an adapter that changes nothing gives."""
        backbone = self.make()
        batch = backbone.collate(self.encoded(backbone))
        plan = CutPlan(1, 1, backbone.total_layers)
        cut = self.cut(backbone, plan)
        base = cut.client("starts", cut.initial_adapter(0)).hidden_states(batch)
        ends = cut.input.end_shapes | cut.output.end_shapes
        start = cut.initial_adapter(0)
        trained = cut.client("trained", random_adapter(cut.shapes) | {name: start[name] for name in ends})
        assert not torch.equal(trained.hidden_states(batch), base)
        assert torch.equal(trained.hidden_states(batch, adapter=False), base)

    def test_training_leaves_the_base_alone(self) -> None:
        """The fingerprint of the frozen base stays, and is the same for two backbones made alike."""
        backbone = self.make()
        before = backbone.fingerprint()
        whole = self.whole(backbone)
        take_steps(whole.client("one", random_adapter(whole.shapes)), [backbone.collate(self.encoded(backbone))])
        assert backbone.fingerprint() == before == self.make().fingerprint()

    def test_every_cut_stores_the_same_bytes(self) -> None:
        """Client and server together store the frozen base once, and fewer client blocks cost fewer bytes."""
        backbone = self.make()
        stored = {plan: self.cut(backbone, plan).stored_bytes() for plan in every_cut(backbone.total_layers)}
        assert len({client + (server or 0) for client, server in stored.values()}) == 1
        ordered = sorted(stored, key=lambda plan: len(plan.input) + len(plan.output))
        assert all(
            stored[less][0] < stored[more][0] for less, more in pairwise(ordered) if len(less.middle) > len(more.middle)
        )

    def test_operations_of_training_are_those_that_torch_counts(self) -> None:
        """What is worked out for either side of a cut is what its products of matrices do."""
        backbone = self.make()
        batch = backbone.collate(self.encoded(backbone)[-1:])  # one sample, so without padding
        layers = backbone.total_layers
        for plan in (CutPlan(0, 0, layers), CutPlan(1, 1, layers), CutPlan.make(None, layers)):
            worked_out = FlopsOfCut(backbone, plan, self.adapter).training(batch)
            if worked_out is None:
                continue
            cut = self.cut(backbone, plan)
            model = cut.client("one", random_adapter(cut.shapes))
            with counted_operations() as total, _on_the_server(cut) as server:
                model.train_loss(batch, 0).backward()
            assert worked_out.client + worked_out.server == total.get_total_flops(), plan
            assert worked_out.server == sum(own.get_total_flops() for own in server), plan
        assert worked_out is None or worked_out.client == worked_out.whole  # the last is the uncut model


@contextmanager
def _on_the_server(cut: CutModel) -> Iterator[list[FlopCounterMode]]:
    """Count the operations of the middle stage alone, each pass by itself."""
    counters: list[FlopCounterMode] = []
    host: Any = cut.host
    names = ("forward", "backward") if host is not None else ()

    def counted(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inside(*args: Any, **options: Any) -> Tensor:
            with counted_operations() as counter:
                counters.append(counter)
                return run(*args, **options)

        return inside

    for name in names:
        setattr(host, name, counted(getattr(host, name)))
    try:
        yield counters
    finally:
        for name in names:
            delattr(host, name)
