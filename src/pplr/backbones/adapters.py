"""What is trained, by name: how it starts, where it sits, how it is written.

An :data:`AdapterState` names every tensor of LoRA as PEFT does on the uncut model, with absolute block numbers
(``base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight``), wherever the block is hosted. So an
adapter means the same for every cut, and loads with ``PeftModel.from_pretrained``. Where whole blocks are trained, it
holds each parameter's difference from the frozen base (``encoder.layer.7.output.dense.weight.delta``): no side needs
the other's tensors to name its start.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pplr.backbones.base import Backbone
from pplr.config import AdapterConfig
from pplr.errors import AdapterError
from pplr.seeds import derive_seed
from pplr.storage import write_atomic

__all__ = [
    "DIFFERENCE",
    "PEFT_PREFIX",
    "AdapterState",
    "adapter_sha256",
    "adapter_shapes",
    "block_of",
    "check_adapter",
    "initial_adapter",
    "is_end",
    "is_lora",
    "load_adapter",
    "natural_order",
    "save_adapter",
]

AdapterState = dict[str, Tensor]
"""Trained tensors by name; float32."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of a tensor in the uncut model."""
DIFFERENCE = ".delta"
"""What ends the name of a difference from a frozen parameter."""
_ENDS, _BLOCKS = "ends.safetensors", "blocks.safetensors"
_BLOCK_NUMBER = re.compile(r"\.layers?\.(\d+)\.")


def is_lora(name: str) -> bool:
    """Tell a LoRA factor from what is trained outside the blocks.

    Example:
        >>> is_lora("layers.9.q_proj.lora_A.weight"), is_lora("item_in.weight")
        (True, False)
    """
    return ".lora_" in name


def is_end(name: str) -> bool:
    """Tell what is trained outside the blocks from what is trained in them.

    Example:
        >>> is_end("item_in.weight"), is_end("encoder.layer.0.output.dense.weight.delta")
        (True, False)
    """
    return not is_lora(name) and not name.endswith(DIFFERENCE)


def block_of(name: str) -> int | None:
    """Read the absolute number of the block that a tensor belongs to; ``None`` for one at the ends.

    Example:
        >>> block_of("base_model.model.encoder.layer.11.output.dense.lora_A.weight"), block_of("item_in.weight")
        (11, None)
    """
    found = _BLOCK_NUMBER.search(name)
    return None if found is None else int(found[1])


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names so that block 10 follows block 9.

    Example:
        >>> natural_order(["layers.10.a", "layers.9.a"])
        ['layers.9.a', 'layers.10.a']
    """
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def adapter_shapes(backbone: Backbone, span: range, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Work out the shape of every tensor trained in a span, whether or not its blocks are held here."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in span:
        if config.kind == "full":
            shapes |= {f"{name}{DIFFERENCE}": shape for name, shape in backbone.parameter_shapes(block).items()}
            continue
        for name, (width_out, width_in) in backbone.linear_shapes(block).items():
            if name.split(".")[-1] in config.target_modules:
                shapes[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (config.rank, width_in)
                shapes[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (width_out, config.rank)
    return {name: shapes[name] for name in natural_order(shapes)}


def initial_adapter(shapes: Mapping[str, tuple[int, ...]], seed: int) -> AdapterState:
    """Draw the adapter that every client starts from: A as LoRA's authors do (Kaiming uniform), all else zero.

    Each tensor has a seed of its own name, so the start is the same for every cut.

    Example:
        >>> start = initial_adapter({"x.lora_A.weight": (2, 4), "x.lora_B.weight": (4, 2)}, seed=0)
        >>> float(start["x.lora_B.weight"].abs().sum())
        0.0
    """
    state: AdapterState = {}
    for name in natural_order(shapes):
        tensor = torch.zeros(shapes[name])
        if "lora_A" in name:
            source = torch.Generator().manual_seed(derive_seed(seed, "initial adapter", name))
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=source)
        state[name] = tensor
    return state


def adapter_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash an adapter's names and numbers."""
    digest = hashlib.sha256()
    for name in natural_order(state):
        digest.update(f"{name} {tuple(state[name].shape)}".encode())
        digest.update(state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_adapter(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, whose: str) -> None:
    """Refuse an adapter with missing, unknown, misshapen or non-finite tensors.

    Raises:
        AdapterError: Says which tensor and what is wrong with it.
    """
    cure = "Use an adapter that this run's model, rank and target modules made."
    if missing := sorted(set(shapes) - set(state)):
        raise AdapterError(f"{whose} lacks {len(missing)} tensors, first {missing[0]}", cure=cure)
    if unknown := sorted(set(state) - set(shapes)):
        raise AdapterError(f"{whose} has {len(unknown)} unknown tensors, first {unknown[0]}", cure=cure)
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != tuple(shape):
            raise AdapterError(f"{whose}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}", cure=cure)
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{whose}: {name} holds NaN or infinite values",
                cure="Lower training.learning_rate, or drop the client.",
            )


def save_adapter(state: AdapterState, folder: Path, config: AdapterConfig, model: str, task: str = "CAUSAL_LM") -> None:
    """Write an adapter as PEFT does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    What is trained outside the blocks is none of PEFT's and goes to ``ends.safetensors``; the differences of whole
    blocks go to ``blocks.safetensors``, instead of PEFT's two files.
    """
    tensors = {name: state[name].detach().contiguous().cpu() for name in natural_order(state)}
    if ends := {name: tensor for name, tensor in tensors.items() if is_end(name)}:
        write_atomic(folder / _ENDS, save(ends, metadata={"format": "pt"}))
    if config.kind == "full":
        blocks = {name: tensor for name, tensor in tensors.items() if not is_end(name)}
        write_atomic(folder / _BLOCKS, save(blocks, metadata={"format": "pt"}))
        return
    from peft import LoraConfig  # late: a federation's server mixes adapters, and loads no model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=sorted(config.target_modules),
        task_type=task,
        base_model_name_or_path=model,
        inference_mode=True,
    ).to_dict()
    lora = {key: sorted(value) if isinstance(value, set) else value for key, value in lora.items()}
    factors = {name: tensor for name, tensor in tensors.items() if is_lora(name)}
    write_atomic(folder / "adapter_model.safetensors", save(factors, metadata={"format": "pt"}))
    text = json.dumps({k: getattr(v, "value", v) for k, v in lora.items()}, indent=2, sort_keys=True, default=str)
    write_atomic(folder / "adapter_config.json", (text + "\n").encode())


def load_adapter(folder: Path) -> AdapterState:
    """Read what :func:`save_adapter` wrote.

    Raises:
        AdapterError: The file is missing or damaged.
    """
    path = folder / _BLOCKS
    if not path.exists():
        path = folder / "adapter_model.safetensors"
    try:
        state = dict(load_file(path))
        if (folder / _ENDS).exists():
            state |= load_file(folder / _ENDS)
        return {name: state[name] for name in natural_order(state)}
    except FileNotFoundError:
        raise AdapterError(f"no adapter at {path}", cure="Train the run to its end, or give another run.") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged ({error})", cure="Go on with --resume to write it again.") from error
