"""A model in two bundles: neither side needs the other's tensors, and together they are the whole model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pplr.backbones import bundles
from pplr.backbones.base import load_backbone
from pplr.backbones.bundles import CheckpointReader, read_bundle, write_bundles
from pplr.backbones.causal_lm import FAMILIES, CausalLM
from pplr.config import AdapterConfig, BackboneConfig, TrainingConfig
from pplr.errors import BackboneError
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import random_adapter, refuses, tiny_decoder, tiny_tokenizer

CONFIGS = AdapterConfig(rank=2), TrainingConfig(learning_rate=0.01, warmup_steps=1)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "whole"
    tiny_decoder(layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder) -> CausalLM:
    backbone = load_backbone(BackboneConfig(model=str(folder), dtype="float32"))
    assert isinstance(backbone, CausalLM)
    return backbone


def trained(model: CutModel, initial) -> dict[str, torch.Tensor]:
    client = model.client("a", initial)
    client.begin_round(3)
    for step in range(3):
        batch = model.backbone.pad([list(range(40 + step, 60)), list(range(70, 80))], [12, 5])
        (client.train_loss(batch, step) / batch.targets).backward()
        client.optimizer_step(1.0)
    return client.adapter()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_two_bundles_train_bit_for_bit_as_the_whole_model(tmp_path, family, tied) -> None:
    source = tmp_path / "whole"
    tiny_decoder(family, tie_word_embeddings=tied).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    write_bundles(source, tmp_path / "cut", input_layers=1, output_layers=1)
    plan = CutPlan(1, 1, 4)
    whole = CutModel(load(source), plan, *CONFIGS)
    shutil.rmtree(source)
    apart = CutModel(load(tmp_path / "cut" / "client"), plan, *CONFIGS, server=load(tmp_path / "cut" / "server"))
    initial = random_adapter(whole.shapes, seed=1)
    ours, theirs = trained(apart, initial), trained(whole, initial)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert apart.stored_bytes() == whole.stored_bytes()


@pytest.mark.parametrize("gone", ["client", "server"])
def test_deleting_one_bundle_changes_nothing_for_the_other(tmp_path, checkpoint, gone) -> None:
    made = dict(
        zip(
            ("client", "server"),
            write_bundles(checkpoint, tmp_path / "cut", input_layers=2, output_layers=0),
            strict=True,
        )
    )
    left = made["server" if gone == "client" else "client"]
    before = {name: tensor.clone() for name, tensor in left.tensors().items()}
    shutil.rmtree(made[gone].folder)
    shutil.rmtree(checkpoint)
    backbone = load(left.folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_bundle(left.folder).tensors().items())
    states = torch.randn(1, 3, backbone.hidden_size)
    span = range(2, 4) if gone == "client" else range(2)
    assert backbone.blocks(span)(states).shape == states.shape
    other = range(2) if gone == "client" else range(2, 4)
    with refuses(BackboneError, f"does not hold block {other.start}"):
        backbone.blocks(other)
    if gone == "client":
        with refuses(BackboneError, "handles no text"):
            _ = backbone.tokenizer


def test_every_tensor_is_in_exactly_one_bundle(tmp_path, checkpoint) -> None:
    client, server = write_bundles(checkpoint, tmp_path / "cut", input_layers=1, output_layers=2)
    assert (client.blocks, server.blocks) == ((0, 2, 3), (1,))
    assert client.base_sha256 == server.base_sha256
    whole = dict(CheckpointReader(checkpoint).tensors(CheckpointReader(checkpoint).names))
    parts = client.tensors(), server.tensors()
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    assert all(torch.equal((parts[0] | parts[1])[name], whole[name]) for name in whole)


def test_a_sharded_checkpoint_gives_the_same_bundles_a_block_at_a_time(tmp_path, checkpoint, monkeypatch) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(checkpoint, sharded)
    (sharded / "model.safetensors").unlink()
    tiny_decoder(layers=4).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    held: list[int] = []
    real = bundles.save

    def save(tensors, **options):
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        return real(tensors, **options)

    monkeypatch.setattr(bundles, "save", save)
    one = write_bundles(checkpoint, tmp_path / "one", input_layers=1, output_layers=1)
    two = write_bundles(sharded, tmp_path / "two", input_layers=1, output_layers=1)
    assert [a.base_sha256 for a in one] == [b.base_sha256 for b in two]
    assert max(held) < sum(held) / 2 / 2  # of one whole model, never the half


def test_the_number_format_is_as_asked(tmp_path, checkpoint) -> None:
    client, _ = write_bundles(checkpoint, tmp_path / "cut", input_layers=1, output_layers=1, dtype="bfloat16")
    assert {tensor.dtype for tensor in client.tensors().values()} == {torch.bfloat16}
    assert json.loads((client.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_two_cuts_of_one_base_know_each_other_and_another_base_is_another(tmp_path, checkpoint) -> None:
    one = load(write_bundles(checkpoint, tmp_path / "one", input_layers=1, output_layers=1)[0].folder)
    two = load(write_bundles(checkpoint, tmp_path / "two", input_layers=2, output_layers=0)[1].folder)
    assert one.fingerprint() == two.fingerprint()
    other = tmp_path / "other"
    tiny_decoder(layers=4, seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    three = load(write_bundles(other, tmp_path / "three", input_layers=1, output_layers=1)[0].folder)
    assert three.fingerprint() != one.fingerprint()


def test_what_is_damaged_newer_or_not_empty_is_refused(tmp_path, checkpoint) -> None:
    client, _ = write_bundles(checkpoint, tmp_path / "cut", input_layers=1, output_layers=1)
    with refuses(BackboneError, "is not empty"):
        write_bundles(checkpoint, tmp_path / "cut", input_layers=1, output_layers=1)
    manifest = client.folder / "bundle.json"
    kept = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(kept) | {"format": bundles.FORMAT + 1}))
    with refuses(BackboneError, "newer than"):
        load(client.folder)
    manifest.write_text(kept[:-9])
    with refuses(BackboneError, "no readable bundle"):
        load(client.folder)
    manifest.write_text(kept)
    block = client.folder / "block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:-1] + b"\x00\x01"[:1])
    content = bytearray(block.read_bytes())
    content[-5] ^= 1
    block.write_bytes(bytes(content))
    with refuses(BackboneError, "does not match its SHA-256"):
        load(client.folder)


@pytest.mark.parametrize("damage", ["no config", "no weights", "a block is missing"])
def test_a_checkpoint_that_cannot_be_cut_is_refused(tmp_path, checkpoint, damage) -> None:
    if damage == "no config":
        (checkpoint / "config.json").unlink()
    elif damage == "no weights":
        (checkpoint / "model.safetensors").write_bytes(b"nothing")
    else:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with refuses(BackboneError, ""):
        write_bundles(checkpoint, tmp_path / "cut", input_layers=1, output_layers=1)
    assert not (tmp_path / "cut" / "client" / "bundle.json").exists()
