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
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.func import functional_call

from pplr.backbones.arithmetic import WideLinear, is_widened
from pplr.backbones.base import Backbone, Blocks
from pplr.config import AdapterConfig
from pplr.errors import AdapterError, BackboneError
from pplr.seeds import derive_seed
from pplr.storage import write_atomic

__all__ = [
    "AdapterSlots",
    "AdapterState",
    "DifferenceSlots",
    "SeededDropout",
    "Slots",
    "adapter_sha256",
    "adapter_shapes",
    "block_of",
    "check_adapter",
    "initial_adapter",
    "inject_adapter",
    "is_end",
    "is_lora",
    "load_adapter",
    "make_slots",
    "natural_order",
    "save_adapter",
]

AdapterState = dict[str, Tensor]
"""Trained tensors by name; float32."""

_PREFIX = "base_model.model."
_ENDS, _BLOCKS = "ends.safetensors", "blocks.safetensors"
_DIFFERENCE = ".delta"
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
    return not is_lora(name) and not name.endswith(_DIFFERENCE)


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


class SeededDropout(nn.Module):
    """Dropout whose mask follows from a seed, not from how many draws came before it.

    So the mask of a block is the same whether the block runs in this process or across a cut.

    Args:
        probability: Share of the inputs that is dropped, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.seed: int | None = None
        self._generator: torch.Generator | None = None

    def reseed(self, seed: int | None) -> None:
        """Set the seed of the mask until the next call; ``None`` lets everything through."""
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        """Drop inputs of any shape; what stays is scaled by 1 / (1 - probability). Run again, it drops the same."""
        if self.seed is None or self.probability == 0:
            return x
        if self._generator is None or self._generator.device != x.device:
            self._generator = torch.Generator(x.device)
        self._generator.manual_seed(self.seed)
        keep = torch.empty_like(x).bernoulli_(1 - self.probability, generator=self._generator)
        return x * keep.div_(1 - self.probability)


class _Lora(LoraLinear):
    """PEFT's LoRA layer, computed in the number format of the base.

    PEFT widens a bfloat16 input to float32 for the sake of float32 adapters; here the small factors are rounded
    instead, as mixed precision does, and the update is added within the product that makes it.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the frozen layer and the update: (..., D_in) -> (..., D_out)."""
        out: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return out
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        if is_widened(x):
            inner = F.linear(self.lora_dropout["default"](x).float(), a.float())
            wide = torch.addmm(
                out.flatten(0, -2).float(), inner.flatten(0, -2), b.float().t(), alpha=self.scaling["default"]
            )
            return wide.to(x.dtype).view_as(out)
        inner = F.linear(self.lora_dropout["default"](x), a.to(x.dtype))  # (..., R)
        update = b.to(x.dtype).t()
        flat = torch.addmm(out.flatten(0, -2), inner.flatten(0, -2), update, alpha=self.scaling["default"])
        return flat.view_as(out)


class Slots(Protocol):
    """The places in a stage where a client's trained tensors are put; the frozen base is shared."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its name in an :data:`AdapterState`."""

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put one client's parameters in place, by reference."""

    def enable(self, enabled: bool) -> None:
        """Let what is trained take part in forward passes, or leave the base alone."""

    def reseed(self, seed: int | None) -> None:
        """Seed the dropout masks of the next forward pass; ``None`` is evaluation."""

    def run(self, blocks: Blocks, *inputs: Any) -> Tensor:
        """Run the blocks with what is bound."""


class DifferenceSlots:
    """Places for every parameter of a stage's blocks, each as its difference from the frozen base.

    Args:
        blocks: The blocks of a span.
        prefix: Where blocks are in the uncut model.
    """

    def __init__(self, blocks: Blocks, prefix: str) -> None:
        for module in blocks.modules():
            if type(module) is WideLinear:
                module.__class__ = nn.Linear  # type: ignore[assignment]  # the wide product has no gradient for the weight
        self._base: dict[str, tuple[str, nn.Parameter]] = {}
        for name, parameter in blocks.layers.named_parameters():
            number, rest = name.split(".", 1)
            absolute = f"{prefix}.{int(number) + blocks.first_layer}.{rest}{_DIFFERENCE}"
            self._base[absolute] = (f"layers.{name}", parameter)
        self._bound: Mapping[str, nn.Parameter] = {}
        self._enabled = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every difference."""
        return {name: tuple(self._base[name][1].shape) for name in natural_order(self._base)}

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take one client's differences, by reference.

        Raises:
            AdapterError: A tensor of this stage is missing.
        """
        if missing := [name for name in self._base if name not in parameters]:
            raise AdapterError(
                f"the adapter has no tensor {missing[0]}", cure="Use an adapter made for this model with adapter.kind."
            )
        self._bound = parameters

    def enable(self, enabled: bool) -> None:
        """Add the differences in forward passes, or leave the base alone."""
        self._enabled = enabled

    def reseed(self, seed: int | None) -> None:
        """Nothing is dropped."""

    def run(self, blocks: Blocks, *inputs: Any) -> Tensor:
        """Run the blocks with base plus difference, added in float32; without the differences, plus nothing."""
        summed = {
            local: (base.float() + (self._bound[name] if self._enabled else 0.0)).to(base.dtype)
            for name, (local, base) in self._base.items()
        }
        return functional_call(blocks, summed, inputs)


class AdapterSlots:
    """The places in a stage where a client's LoRA tensors are put.

    The stage's frozen base is shared; binding another client's parameters is an assignment for each tensor and
    copies nothing.

    Args:
        layers: LoRA layers by their absolute name in the uncut model, without PEFT's prefix.
    """

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        self._layers = {name: layers[name] for name in natural_order(layers)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its name in an :data:`AdapterState`."""
        return {name: tuple(module.weight.shape) for name, module in self._places()}

    def _places(self) -> Iterable[tuple[str, nn.Linear]]:
        for name, layer in self._layers.items():
            yield f"{_PREFIX}{name}.lora_A.weight", layer.lora_A["default"]
            yield f"{_PREFIX}{name}.lora_B.weight", layer.lora_B["default"]

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put one client's parameters in place, by reference.

        Raises:
            AdapterError: A tensor of this stage is missing.
        """
        for name, module in self._places():
            if name not in parameters:
                raise AdapterError(
                    f"the adapter has no tensor {name}", cure="Use an adapter made for this model and these modules."
                )
            module.weight = parameters[name]

    def enable(self, enabled: bool) -> None:
        """Let the adapter take part in forward passes, or leave the base alone."""
        for layer in self._layers.values():
            layer._disable_adapters = not enabled

    def reseed(self, seed: int | None) -> None:
        """Seed the dropout masks of the next forward pass; ``None`` is evaluation."""
        for name, layer in self._layers.items():
            dropout = layer.lora_dropout["default"]
            if isinstance(dropout, SeededDropout):
                dropout.reseed(None if seed is None else derive_seed(seed, name))

    def run(self, blocks: Blocks, *inputs: Any) -> Tensor:
        """Run the blocks, whose layers hold what is bound."""
        return blocks(*inputs)


def make_slots(blocks: Blocks, config: AdapterConfig, prefix: str) -> Slots:
    """Make the places for what is trained in a span of blocks.

    Raises:
        BackboneError: No linear layer of a block has one of the target names.
    """
    if config.kind == "full":
        return DifferenceSlots(blocks, prefix)
    return inject_adapter(blocks.layers, config, first_layer=blocks.first_layer, prefix=prefix)


def inject_adapter(
    layers: nn.ModuleList, config: AdapterConfig, *, first_layer: int, prefix: str = "model.layers"
) -> AdapterSlots:
    """Put empty LoRA layers into a span of blocks, by PEFT.

    Args:
        layers: The blocks of a span, numbered from 0 within it.
        config: Rank, scaling, dropout and target modules.
        first_layer: Absolute number of the span's first block.
        prefix: Where blocks are in the uncut model.

    Raises:
        BackboneError: No linear layer of a block has one of the target names.
    """
    if len(layers) == 0:
        return AdapterSlots({})
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=list(config.target_modules)
    )
    linear = {name.split(".")[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(config.target_modules) - linear):
        raise BackboneError(
            f"the model's blocks have no linear layer called {unknown[0]!r}",
            cure=f"Set adapter.target_modules to some of {sorted(linear)}.",
        )
    lora._register_custom_module({nn.Linear: _Lora})
    inject_adapter_in_model(lora, layers)
    found: dict[str, LoraLayer] = {}
    for name, module in layers.named_modules():
        if isinstance(module, LoraLayer):
            number, rest = name.split(".", 1)
            if config.dropout > 0:
                module.lora_dropout["default"] = SeededDropout(config.dropout)
            found[f"{prefix}.{int(number) + first_layer}.{rest}"] = module
    return AdapterSlots(found)


def adapter_shapes(backbone: Backbone, span: range, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Work out the shape of every tensor trained in a span, whether or not its blocks are held here."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in span:
        if config.kind == "full":
            shapes |= {f"{name}{_DIFFERENCE}": shape for name, shape in backbone.parameter_shapes(block).items()}
            continue
        for name, (width_out, width_in) in backbone.linear_shapes(block).items():
            if name.split(".")[-1] in config.target_modules:
                shapes[f"{_PREFIX}{name}.lora_A.weight"] = (config.rank, width_in)
                shapes[f"{_PREFIX}{name}.lora_B.weight"] = (width_out, config.rank)
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
