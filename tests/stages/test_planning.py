"""What a plan promises is what the bundle then takes."""

from __future__ import annotations

import itertools

import pytest

from pplr.backbones.base import load_backbone
from pplr.backbones.bundles import ENCODERS, write_bundles
from pplr.config import AdapterConfig, BackboneConfig, TrainingConfig
from pplr.errors import BackboneError, CutError, UnsupportedModelError
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.stages.planning import Workload, cut_cost, fitting, parse_bytes, read_sizes, usual_cuts
from pplr.testing import refuses, tiny_decoder, tiny_encoder, tiny_tokenizer

ADAPTER = AdapterConfig(rank=2)
WORKLOAD = Workload(samples=2, tokens=24, targets=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "whole"
    tiny_decoder(layers=6).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sizes(checkpoint):
    return read_sizes(checkpoint, "float32", ADAPTER, WORKLOAD)


@pytest.mark.parametrize(("k", "m"), [(0, 0), (2, 1), (4, 1)])
def test_stored_bytes_are_those_of_the_bundle(tmp_path, checkpoint, sizes, k, m) -> None:
    client, _ = write_bundles(checkpoint, tmp_path / "cut", input_layers=k, output_layers=m)
    assert cut_cost(sizes, CutPlan(k, m, 6), WORKLOAD).stored_bytes == sum(t.nbytes for t in client.tensors().values())


def test_the_wire_is_what_the_transport_counts(checkpoint, sizes) -> None:
    backbone = load_backbone(BackboneConfig(model=str(checkpoint), dtype="float32"))
    model = CutModel(backbone, CutPlan(2, 1, 6), ADAPTER, TrainingConfig())
    client = model.client("a", model.initial_adapter(0))
    client.begin_round(1)
    batch = backbone.pad([list(range(24)), list(range(30, 54))], [18, 18])
    client.train_loss(batch, 0).backward()
    crossed = client.traffic.bytes_up + client.traffic.bytes_down
    assert cut_cost(sizes, CutPlan(2, 1, 6), WORKLOAD).wire_bytes == crossed / 2


def test_more_blocks_cost_more_and_the_shares_of_both_sides_make_one(sizes) -> None:
    costs = [cut_cost(sizes, CutPlan(k, 0, 6), WORKLOAD) for k in range(6)]
    for fewer, more in itertools.pairwise(costs):
        assert fewer.stored_bytes < more.stored_bytes
        assert fewer.memory_bytes < more.memory_bytes
        assert fewer.compute_share < more.compute_share < 1
    step = costs[2].compute_share - costs[1].compute_share
    assert costs[5].compute_share + step == pytest.approx(1)


def test_memory_holds_what_is_kept_for_the_backward_pass(sizes) -> None:
    assert sizes.saved_bytes > 10 * sizes.hidden_size * sizes.itemsize
    small, large = (cut_cost(sizes, CutPlan(2, 0, 6), Workload(n, 24, 6)).memory_bytes for n in (2, 4))
    assert large - small == pytest.approx(2 * 24 * 2 * sizes.saved_bytes + 2 * 6 * sizes.vocabulary * 12, rel=0.01)


def test_speed_is_measured_only_when_asked(checkpoint, sizes) -> None:
    assert cut_cost(sizes, CutPlan(1, 0, 6), WORKLOAD).tokens_per_second is None
    timed = read_sizes(checkpoint, "float32", ADAPTER, WORKLOAD, measure_speed=True)
    one, four = (cut_cost(timed, CutPlan(k, 0, 6), WORKLOAD).tokens_per_second for k in (1, 4))
    assert one is not None
    assert four is not None
    assert one > four > 0


def test_the_usual_cuts_are_legal_and_leave_the_server_a_block() -> None:
    plans = usual_cuts(6)
    assert CutPlan(0, 0, 6) in plans
    assert CutPlan(4, 1, 6) in plans
    assert all(len(plan.middle) >= 1 for plan in plans)
    assert len(set(plans)) == len(plans)


def test_budgets_bind_each_on_its_own(sizes) -> None:
    costs = [cut_cost(sizes, plan, WORKLOAD) for plan in usual_cuts(6)]
    assert all(fitting(costs, None, None))
    middle = sorted(cost.stored_bytes for cost in costs)[len(costs) // 2]
    assert fitting(costs, None, middle) == [cost.stored_bytes <= middle for cost in costs]
    assert fitting(costs, 1, None) == [False] * len(costs)


@pytest.mark.parametrize("text", ["", "GB", "two", "-1GB", "1XB", "nan", "inf"])
def test_what_is_no_size_is_refused(text) -> None:
    with refuses(CutError, "is not a size"):
        parse_bytes(text)


def test_what_cannot_be_planned_is_refused(tmp_path) -> None:
    with refuses(BackboneError, "cannot read"):
        read_sizes(tmp_path, "float32", ADAPTER, WORKLOAD)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with refuses(UnsupportedModelError, "gpt2"):
        read_sizes(tmp_path, "float32", ADAPTER, WORKLOAD)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_plan_for_an_encoder_is_what_its_bundle_takes(tmp_path, family) -> None:
    source = tmp_path / "whole"
    tiny_encoder(family).model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    client, _ = write_bundles(source, tmp_path / "cut", input_layers=1, output_layers=1)
    sizes = read_sizes(source, "float32", AdapterConfig(rank=2), WORKLOAD, measure_speed=True)
    cost = cut_cost(sizes, CutPlan(1, 1, 4), WORKLOAD)
    assert cost.stored_bytes == sum(tensor.nbytes for tensor in client.tensors().values())
    assert cost.compute_share == pytest.approx(0.5)  # no head, and two blocks of four
    assert sizes.adapter_numbers == 2 * 2 * (32 + 32)
    assert cost.tokens_per_second is not None
    assert cost.tokens_per_second > 0
