"""What every backbone and every transport must do, as classes of tests to inherit."""
# ruff: noqa: S101  (a contract is made of assertions)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pplr.backbones.adapters import AdapterState, load_adapter
from pplr.backbones.base import BACKBONES, Backbone, Batch
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import PplrError, TransportError
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.flops import FlopsOfCut
from pplr.stages.host import StageHost
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.stages.transport import Traffic, Transport
from pplr.testing.tiny import every_cut, random_adapter, tiny_backbone, tiny_catalog, tiny_samples

__all__ = ["BackboneContract", "TransportContract", "refuses", "same_adapters", "same_state"]


@contextmanager
def refuses(kind: type[PplrError], words: str = "") -> Iterator[None]:
    """Check that what is inside raises exactly this error, with these words in it, one line and a cure."""
    seen: PplrError | None = None
    try:
        yield
    except PplrError as error:
        seen = error
    assert seen is not None, f"no {kind.__name__} was raised"
    assert type(seen) is kind, f"{type(seen).__name__} instead of {kind.__name__}: {seen}"
    assert words in str(seen), f"{words!r} is not in: {seen}"
    assert seen.cure.strip(), f"no cure: {seen}"
    assert "\n" not in str(seen), f"more than one line: {seen}"


def same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Say whether two states have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_adapters(one: Path, other: Path) -> bool:
    """Say whether two run folders end with the same clients and the same adapters, bit for bit."""
    first, second = (sorted(folder.name for folder in (run / "clients").iterdir()) for run in (one, other))
    return first == second and all(
        same_state(load_adapter(one / "clients" / name), load_adapter(other / "clients" / name)) for name in first
    )


def _copy(state: Mapping[str, Tensor]) -> AdapterState:
    return {name: tensor.clone() for name, tensor in state.items()}


def _train(model: ClientModel, batches: Sequence[Batch]) -> list[float]:
    """Take a step on each batch, with dropout, and return the loss of each."""
    told: list[float] = []
    model.begin_round(2 * len(batches))
    for number, batch in enumerate(batches):
        loss = model.train_loss(batch, number)
        (loss / batch.targets).backward()
        told.append(float(loss.detach()))
        model.optimizer_step(0.5)  # small enough to be clipped by the norm over all stages
    model.end_round()
    return told


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
        expected = _train(model, batches)
        assert not same_state(model.adapter(), start)
        for plan in every_cut(backbone.total_layers)[:-1]:
            cut = self.cut(backbone, plan).client("cut", start)
            assert _train(cut, batches) == expected, plan
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
        losses = _train(expected, batches)
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
        _train(whole.client("one", random_adapter(whole.shapes)), [backbone.collate(self.encoded(backbone))])
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
            with _counting() as total, _on_the_server(cut) as server:
                model.train_loss(batch, 0).backward()
            assert worked_out.client + worked_out.server == total.get_total_flops(), plan
            assert worked_out.server == sum(own.get_total_flops() for own in server), plan
        assert worked_out is None or worked_out.client == worked_out.whole  # the last is the uncut model


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count the operations of what is inside; attention is computed by plain products, each of which counts once."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@contextmanager
def _on_the_server(cut: CutModel) -> Iterator[list[FlopCounterMode]]:
    """Count the operations of the middle stage alone, each pass by itself."""
    counters: list[FlopCounterMode] = []
    host: Any = cut.host
    names = ("forward", "backward") if host is not None else ()

    def counted(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inside(*args: Any, **options: Any) -> Tensor:
            with _counting() as counter:
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
        assert _train(model, self.batches(cut)) == _train(whole, self.batches(cut))
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
            with model.generation() as cache:
                first = model.decode(tokens[:, :8], _decode_call(mask[:, :8], 8), cache)
                model.reorder(cache, rows)
                last = model.decode(tokens[rows, 8:], _decode_call(mask[rows], 4), cache)
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
        with model.generation() as cache, model.generation() as other:
            model.decode(tokens[:, :8].flip(0), _decode_call(torch.ones(2, 8, dtype=torch.long), 8), cache)
            model.decode(tokens[1:, :3], _decode_call(torch.ones(1, 3, dtype=torch.long), 3), other)
            model.reorder(cache, torch.tensor([1]))
            model.append_rows(cache, other, torch.tensor([0]))
            last = torch.stack([tokens[0, 8:9], tokens[1, 3:4]])
            told = model.decode(last, _decode_call(mask, 1), cache)
        for row, length in enumerate((9, 4)):
            ones = torch.ones(1, length, dtype=torch.long)
            with whole.generation() as cache:
                alone = whole.decode(tokens[row : row + 1, :length], _decode_call(ones, length), cache)
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
        with model.generation() as cache:
            model.decode(mask, _decode_call(mask, 5), cache)
            longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            model.decode(longer[:, -1:], _decode_call(longer, 1), cache)
        assert model.traffic.since(before) == Traffic((8 + 2) * state, (8 + 2) * state)

    def test_clients_do_not_touch_each_other(self) -> None:
        """Two clients that train in turns end as when each trains alone, bitwise."""
        shapes = self.cut().shapes
        starts = {"one": random_adapter(shapes, 1), "two": random_adapter(shapes, 2)}
        alone = {}
        for name, start in starts.items():
            cut = self.cut()
            alone[name] = self.admit(cut, name, start)
            _train(alone[name], self.batches(cut))
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
        _train(model, batches)
        adapter, optimizer = _copy(model.adapter()), _copy(model.optimizer_state())
        other = self.admit(cut, "two", random_adapter(cut.shapes, 5))
        other.set_adapter(adapter)
        other.restore_optimizer(optimizer)
        assert _train(other, batches) == _train(model, batches)
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
