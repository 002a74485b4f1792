"""The round on a GPU, at tiny size on a processor; its arithmetic against what torch counts and keeps."""

from __future__ import annotations

import json
from datetime import date

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, measuring, summary
from benchmarks.llama_costs import SHAPES, flops, kept_bytes_per_token
from pplr.stages.stage import Member, Stage, StageCall

TINY = ("--shape", "tiny", "--device", "cpu")
ROWS = [(20, 5)] * 3
RANK = 8


@pytest.fixture
def bench():
    return gpu.Bench(gpu.make_parser().parse_args(TINY), {"0": ROWS})


def test_a_tiny_round_runs_whole() -> None:
    told = gpu.measure(gpu.make_parser().parse_args([*TINY, "--samples", "20", "--epochs", "2"]))
    assert sum(told["samples"].values()) == pytest.approx(20, abs=2)
    assert [len(own) for own in told["seconds"]["epochs"].values()] == [2] * 5
    assert told["seconds"]["measured"] == pytest.approx(
        sum(told["seconds"][part] for part in ("training", "aggregation", "checkpoint")), rel=1e-6
    )
    assert told["extrapolated"]
    assert told["seconds"]["round"] > 10 * told["seconds"]["measured"]
    assert "extrapolated from" in told["notes"][1]
    assert told["rows"][0]["name"].endswith("(extrapolated)")
    assert not told["rows"][0]["met"]
    assert told["peak_bytes"] is None
    assert 0 < told["utilisation"]["of_matmul"] < 1
    json.dumps(told)


def test_fewer_steps_are_fewer_samples_of_all_lengths() -> None:
    every = gpu.read_lengths()
    assert sum(map(len, every.values())) == 1024
    kept = gpu.thinned(every["0"], 64)
    mean = sum(tokens for tokens, _ in every["0"]) / len(every["0"])
    assert sum(tokens for tokens, _ in kept) / 64 == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(("seconds", "whole", "met"), [(180, True, True), (181, True, False), (90, False, False)])
def test_only_a_whole_round_meets_the_aim(seconds: float, whole: bool, met: bool) -> None:
    row = gpu.round_row(seconds, whole)
    assert row["ratio"] == 960 / seconds
    assert row["at_least"] == 16 / 3
    assert row["met"] is met


def test_operations_are_those_that_torch_counts(bench) -> None:
    client = bench.client("0", ROWS)
    batch = bench.backbone.collate(client.encoded)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = client.model.train_loss(batch, 1)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    expected = flops(bench.shape, RANK, ROWS)
    for counter, parts in ((forward, expected["forward"]), (backward, expected["backward"])):
        counted = counter.get_flop_counts()["Global"]
        products = counted[torch.ops.aten.mm] + counted.get(torch.ops.aten.addmm, 0)
        assert products == parts["blocks"] + parts["lora"] + parts["head"]
    whole = 20 * 20 / (20 * 21 / 2)  # torch counts what lies ahead as well
    counted = forward.get_flop_counts()["Global"]
    assert counted[torch.ops.aten.bmm] == whole * expected["forward"]["attention"]


def test_a_7b_round_counts_as_by_hand() -> None:
    shape = SHAPES["llama-7b"]
    assert shape.parameters == 6_738_415_616
    counted = flops(shape, RANK, [(100, 10)])
    assert counted["forward"]["blocks"] == 2 * 100 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert counted["forward"]["attention"] == 32 * 2 * 2 * 4096 * 5050
    assert counted["forward"]["lora"] == 100 * 32 * 2 * 2 * 2 * 8 * 4096
    assert counted["forward"]["head"] == 2 * 10 * 4096 * 32000
    assert counted["backward"]["attention"] == 2 * counted["forward"]["attention"]


def test_activations_take_what_is_counted(bench) -> None:
    stage = Stage(bench.backbone, range(1, 2), bench.config.adapter)
    member = Member(stage, bench.initial, bench.config.training)

    def kept(tokens: int) -> int:
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        states = torch.randn(1, tokens, bench.shape.width, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = stage.run(member, states, StageCall(dropout_seed=1))
        assert out.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    measured = (kept(300) - kept(100)) / 200
    rotary = 2 * bench.shape.width // bench.shape.heads * 4  # cosines and sines, shared by all rows and blocks
    assert measured == pytest.approx(kept_bytes_per_token(bench.shape, RANK, 4) + rotary, rel=0.001)


def test_a_result_is_shown_with_its_device(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "PAGE", tmp_path / "page.md")
    measuring.write_result("gpu", {"device": "A GPU", "rows": [gpu.round_row(120, True)], "notes": ["120.0 s a round"]})
    summary.write_summary()
    page = (tmp_path / "page.md").read_text()
    assert "| the authors' 16 minutes on four GPUs | 8.00 | at least 5.33 | yes |" in page
    assert f"Measured on {date.today().isoformat()} on A GPU beside " in page
    assert "- 120.0 s a round" in page
