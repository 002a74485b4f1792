"""The share of the matmul rate: operations as torch counts them, and time shared out by kind."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.llama_costs import flops
from benchmarks.op_shares import BETWEEN, kind_of, shares_of
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel


def test_operations_are_those_that_torch_counts_where_heads_share_values(small_config, backbone) -> None:
    config = small_config("adapter.rank=2", "adapter.target_modules=[q_proj, v_proj]")
    shape = roofline.shape_of(backbone)
    assert shape.values < shape.width
    model = CutModel(backbone, CutPlan.make(None, backbone.total_layers), config.adapter, config.training)
    client = model.client("0", model.initial_adapter(0))
    (layouts, rows), *_ = roofline.batches_of(config, backbone, 1, 1)
    batch = layouts["padded"]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = client.train_loss(batch, 1)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    expected = flops(shape, 2, rows)
    for counter, parts in ((forward, expected["forward"]), (backward, expected["backward"])):
        told = counter.get_flop_counts()["Global"]
        products = told[torch.ops.aten.mm] + told.get(torch.ops.aten.addmm, 0)
        assert products == parts["blocks"] + parts["lora"] + parts["head"]


def test_operations_in_one_row_are_those_that_torch_counts(small_config, backbone) -> None:
    config = small_config("adapter.rank=2", "adapter.target_modules=[q_proj, v_proj]")
    model = CutModel(backbone, CutPlan.make(None, backbone.total_layers), config.adapter, config.training)
    client = model.client("0", model.initial_adapter(0))
    (layouts, rows), *_ = roofline.batches_of(config, backbone, 4, 1)
    batch = layouts["one row"]
    assert batch.row.prefix > 1
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        client.train_loss(batch, 1).backward()
    told = counter.get_flop_counts()["Global"]
    products = told[torch.ops.aten.mm] + told.get(torch.ops.aten.addmm, 0)
    shape = roofline.shape_of(backbone)
    prefix, lengths = batch.row.prefix, batch.row.lengths
    pairs = sum(range(1, prefix + 1)) + sum(sum(range(prefix + 1, prefix + own + 1)) for own in lengths)
    attention = 3 * 4 * pairs * shape.blocks * shape.width
    assert roofline.counted(shape, 2, batch, rows) == products + attention
    assert roofline.counted(shape, 2, batch, rows) < roofline.counted(shape, 2, layouts["padded"], rows)


def test_the_share_that_could_be_reached_is_the_time_in_products_at_their_rate() -> None:
    where = {"products": {"seconds": 0.5}, "attention": {"seconds": 0.25}, "dropout": {"seconds": 0.25}}
    assert roofline.reachable(where, 80.0, 100.0) == pytest.approx(0.6)
    assert roofline.reachable(where, 120.0, 100.0) == pytest.approx(0.75)
    assert roofline.reachable({"products": {"seconds": 0.5}}, 50.0, 100.0) == pytest.approx(0.25)


def test_every_format_has_rows_for_both_cuts_and_both_layouts(
    small_config, backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    monkeypatch.setattr(roofline, "CUTS", {"uncut": None, "cut": config.cut})
    monkeypatch.setattr(roofline, "SQUARE", 64)
    told = roofline.measure(2, 4, lambda name: (config, backbone))
    start = "share of the machine's measured matmul rate in training, "
    assert [row["name"].removeprefix(start) for row in told["rows"]] == [
        f"{name}, {way}" for name in roofline.DTYPES for way in ("uncut", "cut", "uncut, one row", "cut, one row")
    ]
    for own in told["formats"].values():
        best = own["square_gflops"]["median"]
        for way in ("cut", "cut, one row"):
            assert own["share"][way] == pytest.approx(own["training_gflops"][way]["median"] / best)
        assert 0 <= own["padding"] < 1
        assert 0 < own["saved"] < 1
        layouts = own["layouts"]
        assert layouts["one row"]["places"] < layouts["padded"]["places"]
        for layout in layouts.values():
            assert layout["reachable"] == roofline.reachable(layout["where"], layout["model_gflops"], best)
    assert len(told["notes"]) == (1 + 3 * len(roofline.LAYOUTS)) * len(roofline.DTYPES)
    shown = f"{told['formats']['bfloat16']['layouts']['padded']['reachable']:.1%} is the share that could be reached"
    assert shown in told["notes"][3]
    assert "asked for are 60%" in told["notes"][3]


def test_time_is_shared_out_by_kind_and_adds_up() -> None:
    wide = torch.randn(300, 300)

    def work() -> None:
        for _ in range(20):
            wide @ wide
        torch.nn.functional.silu(wide)
        time.sleep(0.05)

    told = shares_of(work)
    assert sum(part["seconds"] for part in told.values()) == pytest.approx(1)
    assert {"products", "norms and activations", BETWEEN} <= set(told)
    assert told["products"]["bytes"] >= 20 * wide.nbytes
    assert told["norms and activations"]["bytes"] >= wide.nbytes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_to_copy", "copies and number formats"),
        ("aten::add_", "norms and activations"),
        ("aten::addmm", "products"),
        ("aten::index_put_", "copies and number formats"),
        ("aten::index", "look-ups"),
        ("aten::_log_softmax_backward_data", "softmax and ranking"),
        ("aten::gelu", "norms and activations"),
        ("aten::ge", "dropout"),
        ("_HeadLossBackward", "other operations"),
    ],
)
def test_operations_have_their_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind
