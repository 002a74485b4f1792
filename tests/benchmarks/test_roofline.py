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
    (batch, rows), *_ = roofline.batches_of(config, backbone, 1, 1)
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


def test_every_format_has_rows_for_both_cuts(small_config, backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    monkeypatch.setattr(roofline, "CUTS", {"uncut": None, "cut": config.cut})
    monkeypatch.setattr(roofline, "SQUARE", 64)
    told = roofline.measure(2, 4, lambda name: (config, backbone))
    assert [row["name"].rsplit(", ", 2)[1:] for row in told["rows"]] == [
        [name, way] for name in roofline.DTYPES for way in roofline.CUTS
    ]
    for own in told["formats"].values():
        best = own["square_gflops"]["median"]
        assert own["share"]["cut"] == pytest.approx(own["training_gflops"]["cut"]["median"] / best)
        assert 0 <= own["padding"] < 1
    assert len(told["notes"]) == 3 * len(roofline.DTYPES)


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
