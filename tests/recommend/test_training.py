"""Local training against a loop of transformers, PEFT and torch, and what it promises about order and failure."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from pplr.backbones.batching import bucketed_batches
from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, PromptConfig, TrainingConfig
from pplr.data.prompts import Sample
from pplr.errors import FederationError
from pplr.recommend.local_result import LocalResult
from pplr.recommend.training import evaluation_loss, steps_per_round, train_locally
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.stages.optimizer import LocalObjective
from pplr.testing import (
    peft_model,
    random_adapter,
    refuses,
    tiny_catalog,
    tiny_decoder,
    tiny_samples,
    tiny_tokenizer,
)

PROMPT = PromptConfig(noun="trees", verb="planted", instruction="Name one of the {noun}.")
CALM = AdapterConfig(rank=4, dropout=0.0)
DROPPING = AdapterConfig(rank=4, dropout=0.3)
PLAN, WHOLE = CutPlan(1, 1, 4), CutPlan.make(None, 4)
TRAINING = TrainingConfig(batch_size=4, local_epochs=2, learning_rate=0.01, warmup_steps=2, clip_norm=0.5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trees() -> CausalLM:
    return CausalLM(tiny_decoder(), tiny_tokenizer(), prompt=PROMPT, max_tokens=256)


@pytest.fixture(scope="module")
def encoded(trees: CausalLM) -> list:
    return trees.encode(tiny_samples(), tiny_catalog(), 3)


def client(
    backbone: CausalLM, plan: CutPlan, config: TrainingConfig, adapter: AdapterConfig = CALM, seed: int = 0
) -> ClientModel:
    cut = CutModel(backbone, plan, adapter, config)
    return cut.client("0", random_adapter(cut.shapes, seed, scale=0.1))


def train(model: ClientModel, encoded: list, config: TrainingConfig, **options) -> LocalResult:
    settings = {"client": "0", "server_round": 0, "rounds": 2, "seed": 3} | options
    return train_locally(model, encoded, config, **settings)


def copied(model: ClientModel) -> dict:
    return {name: tensor.clone() for name, tensor in model.adapter().items()}


@pytest.mark.parametrize("plan", [PLAN, WHOLE], ids=["cut", "whole"])
def test_two_rounds_equal_a_plain_loop(trees: CausalLM, encoded: list, plan: CutPlan):
    model = client(trees, plan, TRAINING)
    naive = peft_model(trees, CALM, copied(model))
    parameters = {n.replace(".default", ""): p for n, p in naive.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.0)
    steps = steps_per_round(len(encoded), TRAINING)
    schedule = get_linear_schedule_with_warmup(adam, 2, 2 * steps)
    for server_round in range(2):
        told = train(model, encoded, TRAINING, server_round=server_round)
        total = targets = 0.0
        lengths = [len(sample.prompt + sample.answer) for sample in encoded]
        for epoch in range(2):
            for positions in bucketed_batches(lengths, 4, 3, "0", server_round, epoch):
                rows = [torch.tensor(encoded[i].prompt + encoded[i].answer) for i in positions]
                labels = [torch.tensor([-100] * len(encoded[i].prompt) + [*encoded[i].answer]) for i in positions]
                count = sum(len(encoded[i].answer) for i in positions)
                mask = [torch.ones_like(row) for row in rows]
                loss = naive(
                    input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
                    attention_mask=torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
                    labels=torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
                ).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
                adam.step()
                schedule.step()
                adam.zero_grad()
                total, targets = total + float(loss.detach()) * count, targets + count
        assert told.loss == pytest.approx(total / targets, rel=1e-5)
        assert (told.samples, told.steps, told.targets) == (12, steps, targets)
        assert told.tokens == 2 * sum(lengths)
    for name, parameter in parameters.items():
        off = (model.adapter()[name] - parameter.detach()).abs().max() / parameter.detach().abs().max()
        assert float(off) < 1e-5, name


def test_the_cut_changes_nothing_with_dropout(trees: CausalLM, encoded: list):
    results, states = [], []
    for plan in (WHOLE, PLAN, CutPlan(0, 3, 4)):
        model = client(trees, plan, TRAINING, DROPPING)
        results.append(train(model, encoded, TRAINING))
        states.append(model.adapter())
    assert len({result.loss for result in results}) == 1
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 9])
def test_micro_batches_have_the_gradient_of_the_batch(trees: CausalLM, encoded: list, micro: int):
    config = TRAINING.model_copy(update={"batch_size": 6, "local_epochs": 1, "clip_norm": None})

    def gradients(size: int | None) -> tuple[dict, LocalResult]:
        own = config.model_copy(update={"micro_batch_size": size})
        model = client(trees, WHOLE, own)
        kept: dict = {}
        step = model.optimizer_step

        def spying(clip_norm: float | None) -> float:
            for member in model._members:
                kept.update({name: p.grad.clone() for name, p in member.parameters.items()})
            return step(clip_norm)

        model.optimizer_step = spying  # type: ignore[method-assign]
        return kept, train(model, encoded, own)

    trees.model.double()  # so that how a sum is parted is not lost in rounding
    try:
        whole, told = gradients(None)
        parts, told_of_parts = gradients(micro)
    finally:
        trees.model.float()
    assert len(whole) == 16
    for name, gradient in whole.items():
        assert float((parts[name] - gradient).norm() / gradient.norm()) < 1e-6, name
    assert told_of_parts.loss == pytest.approx(told.loss, rel=1e-6)
    assert (told_of_parts.steps, told_of_parts.tokens) == (told.steps, told.tokens) == (1, told.tokens)


def test_the_result_follows_from_seed_client_and_round_alone(trees: CausalLM, encoded: list):
    def trained(**options) -> dict:
        model = client(trees, PLAN, TRAINING, DROPPING)
        train(model, encoded, TRAINING, **options)
        return copied(model)

    first = trained()
    torch.manual_seed(99)
    again = trained()
    assert all(torch.equal(again[name], first[name]) for name in first)
    for other in ({"seed": 4}, {"client": "1"}, {"server_round": 1}):
        changed = trained(**other)
        assert not all(torch.equal(changed[name], first[name]) for name in first), other


def test_a_round_resumed_from_states_goes_on_bitwise(trees: CausalLM, encoded: list):
    straight = client(trees, PLAN, TRAINING, DROPPING)
    train(straight, encoded, TRAINING, server_round=0)
    adapter = copied(straight)
    optimizer = {name: tensor.clone() for name, tensor in straight.optimizer_state().items()}
    train(straight, encoded, TRAINING, server_round=1)
    resumed = client(trees, PLAN, TRAINING, DROPPING, seed=5)
    resumed.set_adapter(adapter)
    resumed.restore_optimizer(optimizer)
    train(resumed, encoded, TRAINING, server_round=1)
    assert all(torch.equal(resumed.adapter()[name], tensor) for name, tensor in straight.adapter().items())


def test_a_reset_optimizer_has_a_schedule_for_each_round(trees: CausalLM, encoded: list):
    config = TRAINING.model_copy(update={"optimizer_state": "reset"})
    rates: list[float] = []
    model = client(trees, WHOLE, config)
    optimizer = model._members[0].optimizer
    step = optimizer.step
    optimizer.step = lambda scale: (step(scale), rates.append(optimizer._adam.param_groups[0]["lr"]))[0]
    for server_round in range(2):
        train(model, encoded, config, server_round=server_round)
    assert rates == [pytest.approx(0.01 * share) for share in (0, 0.5, 1, 0.5)] * 2


def test_advance_is_told_every_sample(trees: CausalLM, encoded: list):
    told: list[int] = []
    train(client(trees, WHOLE, TRAINING), encoded, TRAINING, advance=told.append)
    assert sorted(told) == [2, 2, 4, 4]


@pytest.mark.parametrize(("samples", "steps"), [(1, 2), (4, 2), (5, 4), (8, 4), (9, 6)])
def test_steps_are_known_beforehand(samples: int, steps: int):
    assert steps_per_round(samples, TRAINING) == steps


def test_a_client_without_samples_is_refused(trees: CausalLM):
    with refuses(FederationError, "client 0 has no training samples"):
        train(client(trees, WHOLE, TRAINING), [], TRAINING)


@pytest.mark.parametrize("plan", [PLAN, WHOLE], ids=["cut", "whole"])
def test_a_loss_that_is_not_finite_stops_training(trees: CausalLM, encoded: list, plan: CutPlan):
    model = client(trees, plan, TRAINING)
    with torch.no_grad():
        next(iter(model._members[0].parameters.values())).fill_(math.nan)
    with refuses(FederationError, "the loss of client 0 is nan at step 1 of server round 1"):
        train(model, encoded, TRAINING)


@pytest.mark.parametrize("where", ["loss", "backward"])
def test_a_failing_step_lets_everything_go(trees: CausalLM, encoded: list, where: str, monkeypatch: pytest.MonkeyPatch):
    cut = CutModel(trees, PLAN, CALM, TRAINING)
    start = random_adapter(cut.shapes, scale=0.1)
    model = cut.client("0", start)
    tenancy = cut.host._of("0")
    seen: list[int] = []

    def fail(*_: object) -> None:
        seen.append(len(tenancy.kept))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "loss":
            patch.setattr(trees, "loss", fail)
        else:
            patch.setattr(cut.host, "backward", fail)
        with pytest.raises(KeyboardInterrupt):
            train(model, encoded, TRAINING, objective=LocalObjective(proximal_mu=1.0), anchor=start)
    assert seen == [1]  # an activation was kept when it failed
    assert not tenancy.kept
    assert not any(member.optimizer._anchor for member in (tenancy.member, *model._members))
    # and training can go on as if nothing had been
    fresh = client(trees, PLAN, TRAINING)
    assert train(model, encoded, TRAINING).loss == train(fresh, encoded, TRAINING).loss
    assert all(torch.equal(model.adapter()[name], tensor) for name, tensor in fresh.adapter().items())


def test_the_pull_of_an_anchor_keeps_an_adapter_near_it(trees: CausalLM, encoded: list):
    far = {}
    for mu in (0.0, 100.0):
        model = client(trees, PLAN, TRAINING)
        anchor = copied(model)
        train(model, encoded, TRAINING, objective=LocalObjective(proximal_mu=mu), anchor=anchor)
        far[mu] = sum(float((tensor - anchor[name]).square().sum()) for name, tensor in model.adapter().items())
    assert far[100.0] < far[0.0] / 4


def test_prompts_are_the_same_bytes_in_training_and_inference(trees: CausalLM):
    catalog = tiny_catalog()
    samples = [Sample(0, (0, 1, 2, 3, 4, 5, 6, 7) * 4, 3), *tiny_samples()]
    for sample, training in zip(samples, trees.encode(samples, catalog, 20), strict=True):
        asked = trees.prompt_tokens([catalog.titles[item] for item in sample.history[-20:]], trees.answer_room(catalog))
        assert training.prompt == asked
        text = trees.tokenizer.decode(list(asked))
        assert text.startswith("### Instruction:\nName one of the trees.\n\n### Input:\n")
        assert text.endswith("\n\n### Response:\n")
        assert not any(line.startswith((" ", "\t")) for line in text.splitlines())


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_the_evaluation_loss_is_the_mean_over_answer_tokens(trees: CausalLM, encoded: list, batch_size: int):
    model = client(trees, PLAN, TRAINING, DROPPING)
    total = sum(float(model.evaluation_loss(trees.collate([sample]))) for sample in encoded)
    targets = sum(len(sample.answer) for sample in encoded)
    assert evaluation_loss(model, encoded, batch_size) == pytest.approx(total / targets, rel=1e-5)
    assert evaluation_loss(model, [], batch_size) is None
