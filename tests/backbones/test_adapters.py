"""Adapters by name: their start, their places, their files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from pplr.backbones.adapters import check_adapter, initial_adapter, load_adapter, natural_order, save_adapter
from pplr.backbones.slots import SeededDropout, inject_adapter
from pplr.config import AdapterConfig
from pplr.errors import AdapterError, BackboneError, StorageError
from pplr.testing import peft_model, random_adapter, refuses, tiny_backbone

SHAPES = {"layers.10.lora_A.weight": (2, 8), "layers.9.lora_A.weight": (2, 8), "layers.9.lora_B.weight": (8, 2)}


@given(st.permutations(list(range(30))))
def test_blocks_are_in_the_order_of_their_numbers(numbers: list[int]):
    names = [f"layers.{number}.self_attn.q_proj" for number in numbers]
    assert natural_order(names) == [f"layers.{number}.self_attn.q_proj" for number in range(30)]


def test_the_start_is_as_peft_draws_it_and_follows_from_the_seed():
    start = initial_adapter(SHAPES, 0)
    assert list(start) == ["layers.9.lora_A.weight", "layers.9.lora_B.weight", "layers.10.lora_A.weight"]
    assert all(tensor.dtype == torch.float32 for tensor in start.values())
    assert float(start["layers.9.lora_B.weight"].abs().max()) == 0
    wide = initial_adapter({"x.lora_A.weight": (64, 256)}, 0)["x.lora_A.weight"]
    bound = 1 / math.sqrt(256)  # Kaiming uniform with a = √5
    assert 0.99 * bound < float(wide.abs().max()) <= bound
    assert float(wide.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_each_tensor_has_a_draw_of_its_own():
    start = initial_adapter(SHAPES, 0)
    torch.manual_seed(123)
    alone = initial_adapter({"layers.10.lora_A.weight": (2, 8)}, 0)
    assert torch.equal(alone["layers.10.lora_A.weight"], start["layers.10.lora_A.weight"])
    assert not torch.equal(start["layers.9.lora_A.weight"], start["layers.10.lora_A.weight"])
    assert not torch.equal(initial_adapter(SHAPES, 1)["layers.9.lora_A.weight"], start["layers.9.lora_A.weight"])


def test_dropout_is_inverted_dropout_of_its_seed():
    dropout = SeededDropout(0.25)
    ones = torch.ones(100, 100)
    assert torch.equal(dropout(ones), ones)  # no seed: evaluation
    dropout.reseed(5)
    first, again = dropout(ones), dropout(ones)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((first == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(again, first)  # a block that runs again drops the same
    dropout.reseed(6)
    assert not torch.equal(dropout(ones), first)
    dropout.reseed(None)
    assert torch.equal(dropout(ones), ones)


@pytest.mark.parametrize(("probability", "size"), [(0.05, 99_999), (0.5, 100_001), (0.9, 100_002)])
def test_dropout_drops_its_share_of_any_number_of_elements(probability: float, size: int):
    dropout = SeededDropout(probability)
    dropout.reseed(3)
    dropped = dropout(torch.ones(size, dtype=torch.bfloat16)) == 0
    spread = math.sqrt(probability * (1 - probability) / size)
    assert float(dropped.float().mean()) == pytest.approx(probability, abs=4 * spread)
    neighbours = (dropped[1:] & dropped[:-1]).float().mean()  # draws that share one word are independent
    assert float(neighbours) == pytest.approx(probability**2, abs=6 * spread)


def test_dropout_passes_its_own_mask_to_gradients():
    dropout = SeededDropout(0.5)
    dropout.reseed(1)
    x = torch.ones(50, requires_grad=True)
    dropped = dropout(x)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())


def test_blocks_of_one_pass_have_different_masks():
    backbone = tiny_backbone(layers=2)
    blocks = backbone.blocks(range(2))
    slots = inject_adapter(blocks.layers, AdapterConfig(dropout=0.5), first_layer=0)
    slots.reseed(0)
    layers = [layer.self_attn.q_proj.lora_dropout["default"] for layer in blocks.layers]
    ones = torch.ones(64)
    masks = [layer(ones) for layer in layers]
    assert not torch.equal(*masks)
    later = backbone.blocks(range(1, 2))
    slots = inject_adapter(later.layers, AdapterConfig(dropout=0.5), first_layer=1)
    slots.reseed(0)
    assert torch.equal(later.layers[0].self_attn.q_proj.lora_dropout["default"](ones), masks[1])


def test_names_are_those_of_peft_on_the_uncut_model():
    backbone = tiny_backbone()
    config = AdapterConfig(rank=3, target_modules=("q_proj", "o_proj", "gate_proj"))
    slots = inject_adapter(backbone.blocks(range(4)).layers, config, first_layer=0)
    trainable = peft_model(backbone, config, initial_adapter(slots.shapes, 0))
    names = {n.replace(".default", ""): tuple(p.shape) for n, p in trainable.named_parameters() if p.requires_grad}
    assert slots.shapes == names
    spans = [inject_adapter(backbone.blocks(s).layers, config, first_layer=s.start) for s in (range(3), range(3, 4))]
    assert spans[0].shapes | spans[1].shapes == names


def test_binding_refers_and_does_not_copy():
    slots = inject_adapter(tiny_backbone().blocks(range(1, 2)).layers, AdapterConfig(), first_layer=1)
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in slots.shapes.items()}
    slots.bind(parameters)
    assert all(module.weight is parameters[name] for name, module in slots._places())
    del parameters[name := next(iter(parameters))]
    with refuses(AdapterError, name):
        slots.bind(parameters)


def test_unknown_modules_are_refused_by_name():
    blocks = tiny_backbone().blocks(range(4))
    with refuses(BackboneError, "no linear layer called 'query'"):
        inject_adapter(blocks.layers, AdapterConfig(target_modules=("q_proj", "query")), first_layer=0)
    with refuses(BackboneError, "'q_proj'"):  # the cure lists what there is
        inject_adapter(blocks.layers, AdapterConfig(target_modules=("norm",)), first_layer=0)


def test_what_does_not_fit_is_refused():
    shapes = {"a": (2, 3), "b": (3, 2)}
    good = {name: torch.zeros(shape) for name, shape in shapes.items()}
    check_adapter(good, shapes, whose="mine")
    for bad, words in [
        ({"a": good["a"]}, "mine lacks 1 tensors, first b"),
        (good | {"c": torch.zeros(1)}, "mine has 1 unknown tensors, first c"),
        (good | {"b": torch.zeros(2, 3)}, "mine: b has shape (2, 3), expected (3, 2)"),
        (good | {"b": torch.full((3, 2), math.inf)}, "mine: b holds NaN or infinite"),
        (good | {"b": torch.tensor([[0, 0], [0, math.nan], [0, 0]])}, "mine: b holds NaN or infinite"),
    ]:
        with refuses(AdapterError, words):
            check_adapter(bad, shapes, whose="mine")


def test_files_give_back_what_was_saved(tmp_path: Path):
    config = AdapterConfig(rank=2, lora_alpha=7.0, dropout=0.1, target_modules=("v_proj", "q_proj"))
    state = random_adapter(SHAPES)
    save_adapter(state, tmp_path / "new" / "folder", config, "owner/model")
    back = load_adapter(tmp_path / "new" / "folder")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    written = LoraConfig.from_pretrained(str(tmp_path / "new" / "folder"))
    assert (written.r, written.lora_alpha, written.lora_dropout) == (2, 7.0, 0.1)
    assert set(written.target_modules) == {"q_proj", "v_proj"}
    assert written.base_model_name_or_path == "owner/model"
    assert written.inference_mode


def test_saving_is_the_same_bytes_each_time(tmp_path: Path):
    state = random_adapter(SHAPES)
    for folder in ("one", "two"):
        save_adapter(
            dict(reversed(state.items())) if folder == "two" else state, tmp_path / folder, AdapterConfig(), "m"
        )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    with refuses(AdapterError, "no adapter at"):
        load_adapter(tmp_path)
    save_adapter(random_adapter(SHAPES), tmp_path, AdapterConfig(), "m")
    path = tmp_path / "adapter_model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-5], content[:4], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with refuses(AdapterError, "is damaged"):
            load_adapter(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with refuses(StorageError, "file"):
        save_adapter(random_adapter(SHAPES), tmp_path / "file", AdapterConfig(), "m")
