"""The cut model against the uncut one: transformers, PEFT and torch alone are the truth."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from pplr.backbones.adapters import AdapterState, save_adapter
from pplr.backbones.base import Batch
from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import AdapterError, CheckpointError
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.stages.optimizer import LocalObjective
from pplr.testing import every_cut, peft_model, random_adapter, refuses, tiny_backbone

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},  # two full, two sliding
    "qwen3": {"tie_word_embeddings": True},
}
CUTS = every_cut(4)
CUT_NAMES = [f"k{plan.input_layers}-m{plan.output_layers}" for plan in CUTS]
ADAPTER = AdapterConfig(rank=4, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.1)
STEPS, SCHEDULE, CLIP = 5, 8, 0.5


@dataclass
class Truth:
    """The uncut model with its adapter, and what it computes."""

    backbone: CausalLM
    start: AdapterState
    batch: Batch
    mask: Tensor
    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    trained: dict[str, Tensor]


def _plain(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}


def _labels(batch: Batch) -> Tensor:
    return batch.input_ids.masked_fill(~batch.is_target, -100)


@pytest.fixture(scope="module", params=FAMILIES)
def truth(request: pytest.FixtureRequest) -> Truth:
    backbone = tiny_backbone(request.param, **FAMILIES[request.param])
    backbone.model.double()  # so that what Adam makes of rounding does not stand between the two
    shapes = CutModel(backbone, CUTS[-1], ADAPTER, TRAINING).shapes
    start = random_adapter(shapes, scale=0.1)
    source = torch.Generator().manual_seed(7)
    rows = [torch.randint(0, 256, (length,), generator=source).tolist() for length in (24, 17, 6)]
    batch = backbone.pad(rows, [18, 12, 2])
    mask = (torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]).long()
    model = peft_model(backbone, ADAPTER, start)
    out = model(input_ids=batch.input_ids, attention_mask=mask, labels=_labels(batch))
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in _plain(model).items()}

    parameters = list(_plain(model).values())
    adam = torch.optim.AdamW(parameters, lr=TRAINING.learning_rate, weight_decay=TRAINING.weight_decay)
    schedule = get_linear_schedule_with_warmup(adam, TRAINING.warmup_steps, SCHEDULE)
    for _ in range(STEPS):
        adam.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=mask, labels=_labels(batch)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        assert norm > CLIP  # or clipping would be untested
        adam.step()
        schedule.step()
    trained = {name: p.detach() for name, p in _plain(model).items()}
    return Truth(backbone, start, batch, mask, out.logits.detach(), out.loss.detach(), gradients, trained)


def _gradients(cut: CutModel, model: ClientModel, name: str) -> dict[str, Tensor]:
    members = list(model._members)
    if cut.host is not None:
        members.append(cut.host._of(name).member)
    return {key: p.grad for member in members for key, p in member.parameters.items() if p.grad is not None}


def _assert_near(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Compare tensor by tensor, relative to each tensor's largest value."""
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        off = float((one[name] - tensor).abs().max() / tensor.abs().max())
        assert off < tolerance, f"{name} is off by {off:.1e}"


@pytest.mark.parametrize("plan", CUTS, ids=CUT_NAMES)
def test_the_cut_model_is_the_uncut_model(truth: Truth, plan: CutPlan):
    cut = CutModel(truth.backbone, plan, ADAPTER, TRAINING)
    model = cut.client("one", truth.start)
    logits = truth.backbone.logits(model.hidden_states(truth.batch))
    real = truth.mask.bool()
    torch.testing.assert_close(logits[real], truth.logits[real], rtol=1e-5, atol=1e-4)

    model.begin_round(SCHEDULE)
    loss = model.train_loss(truth.batch, 0) / truth.batch.targets
    torch.testing.assert_close(loss.detach(), truth.loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    _assert_near(_gradients(cut, model, "one"), truth.gradients, 1e-5)

    model.begin_round(SCHEDULE)
    for _ in range(STEPS):
        (model.train_loss(truth.batch, 0) / truth.batch.targets).backward()
        model.optimizer_step(CLIP)
    _assert_near(model.adapter(), truth.trained, 1e-5)
    _assert_unlike(model.adapter(), truth.start)


def _assert_unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in other.items():
        assert float((one[name] - tensor).abs().max()) > 1e-3, f"{name} was not trained"


def _five_steps_with_dropout(truth: Truth, plan: CutPlan, seed: int = 0) -> tuple[list[float], AdapterState]:
    model = CutModel(truth.backbone, plan, ADAPTER.model_copy(update={"dropout": 0.3}), TRAINING).client(
        "one", truth.start
    )
    losses = []
    model.begin_round(SCHEDULE)
    for step in range(STEPS):
        loss = model.train_loss(truth.batch, seed + step)
        (loss / truth.batch.targets).backward()
        model.optimizer_step(CLIP)
        losses.append(float(loss.detach()))
    return losses, model.adapter()


def test_dropout_does_not_depend_on_the_cut(truth: Truth):
    losses, adapter = _five_steps_with_dropout(truth, CUTS[-1])
    assert losses[0] != pytest.approx(float(truth.loss) * truth.batch.targets, rel=1e-3)  # masks do something
    other_losses, other = _five_steps_with_dropout(truth, CUTS[-1], seed=100)
    assert losses[0] != other_losses[0]
    assert not torch.equal(next(iter(adapter.values())), next(iter(other.values())))
    for plan in (CutPlan(1, 1, 4), CutPlan(0, 3, 4)):  # the backbone's contract goes through every cut
        own_losses, own = _five_steps_with_dropout(truth, plan)
        assert own_losses == losses
        assert all(torch.equal(own[name], adapter[name]) for name in adapter), plan


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised and caught inside PEFT
def test_saved_adapters_load_with_peft(truth: Truth, tmp_path):
    model = CutModel(truth.backbone, CutPlan(1, 1, 4), ADAPTER, TRAINING).client("one", truth.start)
    model.begin_round(SCHEDULE)
    for _ in range(2):
        model.train_loss(truth.batch, 0).backward()
        model.optimizer_step(CLIP)
    save_adapter(model.adapter(), tmp_path, ADAPTER, "a model")
    whole = PeftModel.from_pretrained(copy.deepcopy(truth.backbone.model), tmp_path).eval()
    with torch.no_grad():
        expected = whole(input_ids=truth.batch.input_ids, attention_mask=truth.mask).logits
    real = truth.mask.bool()
    logits = truth.backbone.logits(model.hidden_states(truth.batch))
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-4)
    assert not torch.allclose(expected[real], truth.logits[real], atol=1e-2)  # training moved it


@pytest.fixture(scope="module")
def llama() -> CausalLM:
    return tiny_backbone()


@pytest.fixture
def batches(llama: CausalLM) -> list[Batch]:
    rows = [list(range(start, start + length)) for start, length in ((3, 14), (40, 9), (90, 11), (5, 6))]
    return [llama.pad(rows[:2], [9, 4]), llama.pad(rows[2:], [5, 3])]


def _train(model: ClientModel, batches: list[Batch], seed: int = 0) -> None:
    model.begin_round(SCHEDULE)
    for step, batch in enumerate(batches):
        (model.train_loss(batch, seed + step) / batch.targets).backward()
        model.optimizer_step(CLIP)
    model.end_round()


def test_base_embeddings_stay_while_an_adapter_is_trained(llama: CausalLM, batches: list[Batch]):
    cut = CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    model = cut.client("one", random_adapter(cut.shapes))
    with torch.no_grad():
        base = llama.model.model(
            input_ids=batches[0].input_ids,
            attention_mask=(torch.arange(14)[None] < batches[0].lengths[:, None]).long(),
        ).last_hidden_state
    real = torch.arange(14)[None] < batches[0].lengths[:, None]

    def check() -> None:
        states = llama.final_states(model.hidden_states(batches[0], adapter=False))
        torch.testing.assert_close(states[real], base[real], rtol=1e-5, atol=1e-5)

    check()
    model.begin_round(SCHEDULE)
    loss = model.train_loss(batches[0], 0)
    check()  # between a forward pass and its backward pass
    loss.backward()
    model.optimizer_step(CLIP)
    check()
    alone = cut.client("two", random_adapter(cut.shapes))
    _train(alone, batches[:1])
    assert all(torch.equal(alone.adapter()[name], tensor) for name, tensor in model.adapter().items())


def test_every_client_and_every_cut_starts_from_one_adapter(llama: CausalLM):
    starts = [CutModel(llama, plan, ADAPTER, TRAINING).initial_adapter(3) for plan in CUTS]
    for start in starts[1:]:
        assert start.keys() == starts[0].keys()
        assert list(start) == list(starts[0])
        assert all(torch.equal(start[name], starts[0][name]) for name in start)
    cut = CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    for state in (cut.client("one", starts[0]).adapter(), cut.client("two", starts[0]).adapter()):
        assert all(torch.equal(state[name], starts[0][name]) for name in starts[0])
    other = cut.initial_adapter(4)
    assert all(torch.equal(other[name], starts[0][name]) == ("lora_B" in name) for name in other)
    assert all(float(tensor.abs().max()) == 0 for name, tensor in other.items() if "lora_B" in name)


def test_clients_and_stages_share_one_base(llama: CausalLM, monkeypatch: pytest.MonkeyPatch):
    whole = {p.data_ptr() for p in llama.model.parameters()}
    cut = CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    stages = [cut.input, cut.output, cut.host.stage]
    places = [{p.data_ptr() for name, p in stage.blocks.named_parameters() if "lora_" not in name} for stage in stages]
    assert all(place <= whole for place in places)
    assert len(set.union(*places)) == sum(map(len, places))  # and no block is in two stages
    monkeypatch.setattr(CausalLM, "blocks", None)  # clients build no blocks
    start = cut.initial_adapter(0)
    clients = [cut.client(str(number), start) for number in range(3)]
    for client in clients:
        assert all(stage in stages for stage in client._stages)
    owned = [{t.data_ptr() for t in client.adapter().values()} for client in clients]
    assert not owned[0] & owned[1]


def test_the_whole_model_keeps_clear_of_lora(llama: CausalLM):
    CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    assert not any("lora" in name for name, _ in llama.model.named_parameters())


@pytest.mark.parametrize("plan", [CutPlan(1, 1, 4), CUTS[-1]], ids=["cut", "whole"])
def test_clients_that_take_turns_train_as_alone(llama: CausalLM, batches: list[Batch], plan: CutPlan):
    dropping = ADAPTER.model_copy(update={"dropout": 0.3})

    def fresh(cut: CutModel, name: str) -> ClientModel:
        return cut.client(name, random_adapter(cut.shapes, seed=int(name)))

    alone = {}
    for name in "12":
        alone[name] = fresh(CutModel(llama, plan, dropping, TRAINING), name)
        _train(alone[name], batches * 2, seed=10 * int(name))
    cut = CutModel(llama, plan, dropping, TRAINING)
    turns = {name: fresh(cut, name) for name in "12"}
    for model in turns.values():
        model.begin_round(SCHEDULE)
    for step, batch in enumerate(batches * 2):
        for name, model in turns.items():
            (model.train_loss(batch, 10 * int(name) + step) / batch.targets).backward()
        for model in turns.values():
            model.optimizer_step(CLIP)
    for name, model in turns.items():
        for key, tensor in alone[name].adapter().items():
            assert torch.equal(model.adapter()[key], tensor), key
    # the comparison would see one wrong mask
    spoiled = fresh(CutModel(llama, plan, dropping, TRAINING), "1")
    _train(spoiled, batches * 2, seed=11)
    assert any(not torch.equal(spoiled.adapter()[key], tensor) for key, tensor in alone["1"].adapter().items())


@pytest.mark.parametrize("plan", [CutPlan(0, 1, 4), CutPlan(2, 1, 4), CUTS[-1]], ids=["k0", "k2", "whole"])
def test_optimizer_state_goes_on_bitwise(llama: CausalLM, batches: list[Batch], plan: CutPlan):
    cut = CutModel(llama, plan, ADAPTER, TRAINING)
    model = cut.client("one", random_adapter(cut.shapes))
    _train(model, batches)
    adapter = {name: tensor.clone() for name, tensor in model.adapter().items()}
    state = {name: tensor.clone() for name, tensor in model.optimizer_state().items()}
    assert int(state["steps"]) == 2
    assert {name.split(".", 1)[0] for name in state} == {"steps", "step", "exp_avg", "exp_avg_sq"}
    other = cut.client("two", adapter)
    other.restore_optimizer(state)
    unrestored = cut.client("three", adapter)
    for each in (model, other, unrestored):
        _train(each, batches)
    assert all(torch.equal(other.adapter()[name], tensor) for name, tensor in model.adapter().items())
    assert not all(torch.equal(unrestored.adapter()[name], tensor) for name, tensor in model.adapter().items())
    with refuses(CheckpointError, "step count"):
        other.restore_optimizer({})


def test_clipping_is_by_the_norm_over_all_stages(llama: CausalLM, batches: list[Batch]):
    norms = []
    for plan in CUTS:
        cut = CutModel(llama, plan, ADAPTER, TRAINING)
        model = cut.client("one", random_adapter(cut.shapes))
        model.begin_round(SCHEDULE)
        model.train_loss(batches[0], 0).backward()
        gradients = _gradients(cut, model, "one").values()
        naive = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
        norms.append(model.optimizer_step(CLIP))
        assert norms[-1] == pytest.approx(naive, rel=1e-9)
    assert norms == pytest.approx([norms[0]] * len(CUTS), rel=1e-9)


@pytest.mark.parametrize("plan", [CutPlan(1, 1, 4), CutPlan(0, 0, 4), CUTS[-1]], ids=["cut", "k0-m0", "whole"])
def test_the_proximal_term_is_the_formula_added_to_the_loss(llama: CausalLM, batches: list[Batch], plan: CutPlan):
    mu, batch = 0.7, batches[0]
    cut = CutModel(llama, plan, ADAPTER, TRAINING)
    start, anchor = random_adapter(cut.shapes, 1), random_adapter(cut.shapes, 2)
    naive = peft_model(llama, ADAPTER, start)
    mask = (torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]).long()
    loss = naive(input_ids=batch.input_ids, attention_mask=mask, labels=_labels(batch)).loss
    parameters = _plain(naive)
    loss = loss + mu / 2 * sum((p - anchor[name]).square().sum() for name, p in parameters.items())
    loss.backward()
    norm = float(torch.stack([p.grad.square().sum() for p in parameters.values()]).sum().sqrt())

    model = cut.client("one", start)
    model.begin_round(1, LocalObjective(proximal_mu=mu), anchor)
    (model.train_loss(batch, 0) / batch.targets).backward()
    members = [*model._members, *([] if cut.host is None else [cut.host._of("one").member])]
    for member in members:
        member.optimizer.gradient_norm_squared()
    _assert_near(_gradients(cut, model, "one"), {name: p.grad for name, p in parameters.items()}, 1e-5)

    again = cut.client("two", start)
    again.begin_round(1, LocalObjective(proximal_mu=mu), anchor)
    (again.train_loss(batch, 0) / batch.targets).backward()
    assert again.optimizer_step(None) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("plan", [CutPlan(1, 1, 4), CutPlan(0, 0, 4), CUTS[-1]], ids=["cut", "k0-m0", "whole"])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_freezing_a_leaves_a_untouched(llama: CausalLM, batches: list[Batch], plan: CutPlan, mu: float):
    cut = CutModel(llama, plan, ADAPTER, TRAINING.model_copy(update={"weight_decay": 0.5, "warmup_steps": 0}))
    start, anchor = random_adapter(cut.shapes, 1), random_adapter(cut.shapes, 2)
    model = cut.client("one", start)
    model.begin_round(8, LocalObjective(train_a=False, proximal_mu=mu), anchor)
    for batch in batches:
        model.train_loss(batch, 0).backward()
        model.optimizer_step(CLIP)
    model.end_round()
    for name, tensor in model.adapter().items():
        assert torch.equal(tensor, start[name]) == ("lora_A" in name), name
    _train(model, batches)  # and a round without it trains A again
    assert not any(torch.equal(tensor, start[name]) for name, tensor in model.adapter().items())


def test_adapters_that_do_not_fit_are_refused(llama: CausalLM):
    cut = CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    start = cut.initial_adapter(0)
    name = next(iter(start))
    with refuses(AdapterError, "lacks 1 tensors"):
        cut.client("one", {key: tensor for key, tensor in start.items() if key != name})
    with refuses(AdapterError, "unknown"):
        cut.client("one", start | {"other": torch.zeros(1)})
    with refuses(AdapterError, "shape (1, 1)"):
        cut.client("one", start | {name: torch.zeros(1, 1)})
    with refuses(AdapterError, "NaN"):
        cut.client("one", start | {name: torch.full_like(start[name], torch.nan)})
    cut.client("one", start)  # nothing was admitted by the refused calls


def test_an_adapter_is_copied_in(llama: CausalLM):
    cut = CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    start = cut.initial_adapter(0)
    model = cut.client("one", start)
    new = random_adapter(cut.shapes)
    model.set_adapter(new)
    for name, tensor in model.adapter().items():
        assert torch.equal(tensor, new[name])
        assert tensor.data_ptr() not in (new[name].data_ptr(), start[name].data_ptr())


@pytest.mark.parametrize("place", ["layers.0.", "layers.2.", "layers.3."])
@pytest.mark.parametrize("spoil", [lambda t: t[:, :1], lambda t: t * torch.nan], ids=["misshapen", "NaN"])
def test_an_adapter_that_does_not_fit_is_copied_nowhere(llama: CausalLM, place: str, spoil: Any):
    cut = CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    start = cut.initial_adapter(0)
    model = cut.client("one", start)
    new = random_adapter(cut.shapes)
    name = next(name for name in new if place in name)
    with refuses(AdapterError, name):
        model.set_adapter(new | {name: spoil(new[name])})
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.adapter().items())


def test_dismissed_clients_can_come_again(llama: CausalLM):
    cut = CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    start = cut.initial_adapter(0)
    cut.client("one", start)
    cut.dismiss("one")
    cut.dismiss("never there")
    cut.client("one", start)
    CutModel(llama, CUTS[-1], ADAPTER, TRAINING).dismiss("one")


def test_caches_are_closed_when_generation_fails(llama: CausalLM):
    cut = CutModel(llama, CutPlan(1, 1, 4), ADAPTER, TRAINING)
    model = cut.client("one", cut.initial_adapter(0))
    caches = cut.host._of("one").caches

    def interrupted() -> None:
        with model.generation():
            assert len(caches) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not caches


@pytest.mark.parametrize("lowest", [0, 2])
@pytest.mark.parametrize("plan", [CutPlan.make(None, 4), CutPlan(3, 0, 4)], ids=["whole", "cut"])
def test_no_gradient_is_computed_below_the_lowest_block_that_is_trained(plan: CutPlan, lowest: int):
    backbone = tiny_backbone()
    batch = backbone.pad([[1, 2, 3, 4, 5]], [2])
    cut = CutModel(backbone, plan, ADAPTER, TRAINING)
    model = cut.client("one", random_adapter(cut.shapes))
    for name, parameter in model._members[0].parameters.items():
        parameter.requires_grad_(int(name.split(".layers.")[1].split(".")[0]) >= lowest)
    entered: list[bool] = []
    layers = cut.input.blocks.layers
    handles = [
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0].requires_grad)) for layer in layers
    ]
    try:
        model.train_loss(batch, None).backward()
    finally:
        for handle in handles:
            handle.remove()
    assert entered == [number > lowest for number in range(len(layers))]
    trained = {
        int(n.split(".layers.")[1].split(".")[0]) for n, p in model._members[0].parameters.items() if p.grad is not None
    }
    assert trained == set(range(lowest, len(layers)))
