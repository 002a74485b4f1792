"""Where a client's trained tensors sit in a stage: LoRA's factors in its linear layers, or differences of whole blocks.

The frozen base of a stage is shared by all clients; putting another client's tensors in place copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from pplr.backbones.adapters import DIFFERENCE, PEFT_PREFIX, natural_order
from pplr.backbones.arithmetic import WideLinear, is_widened
from pplr.backbones.base import Blocks
from pplr.config import AdapterConfig
from pplr.errors import AdapterError, BackboneError
from pplr.seeds import derive_seed

__all__ = ["AdapterSlots", "DifferenceSlots", "SeededDropout", "Slots", "Tenant", "inject_adapter", "make_slots"]

_LOWEST = -(2**63)
"""The least int64: draws from it on use all 64 bits."""


class SeededDropout(nn.Module):
    """Dropout whose mask follows from a seed, not from how many draws came before it.

    So the mask of a block is the same whether the block runs in this process or across a cut.

    Args:
        probability: Share of the inputs that is dropped, in [0, 1); rounded to a multiple of 2⁻¹⁶.
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
        return self.dropped(x, self.seed)

    def dropped(self, x: Tensor, seed: int | None) -> Tensor:
        """Drop inputs of any shape by a seed; ``None`` lets everything through."""
        if seed is None or self.probability == 0:
            return x
        if self._generator is None or self._generator.device != x.device:
            self._generator = torch.Generator(x.device)
        self._generator.manual_seed(seed)
        return x * self._scales(x)

    def _scales(self, x: Tensor) -> Tensor:
        """Draw 0 or 1 / (1 - probability) for each element; four draws of 16 bits come of one of 64."""
        count = -(-x.numel() // 4)
        drawn = torch.empty(count, dtype=torch.int64, device=x.device).random_(_LOWEST, None, generator=self._generator)
        kept = drawn.view(torch.int16)[: x.numel()] >= round(self.probability * 2**16) - 2**15
        return kept.view(x.shape).to(x.dtype).div_(1 - self.probability)


@dataclass(frozen=True)
class Tenant:
    """One of several clients whose tokens pass a stage at once.

    Args:
        parameters: Its trained tensors, by name.
        tokens: How many of the tokens are its own, with padding.
        seed: Of its dropout masks; ``None`` drops nothing.
    """

    parameters: Mapping[str, nn.Parameter]
    tokens: int
    seed: int | None


@dataclass(frozen=True)
class _Share:
    """What a layer has of one client among several."""

    a: Tensor
    b: Tensor
    tokens: int
    seed: int | None


class _Lora(LoraLinear):
    """PEFT's LoRA layer, computed in the number format of the base.

    PEFT widens a bfloat16 input to float32 for the sake of float32 adapters; here the small factors are rounded
    instead, as mixed precision does, and the update is added within the product that makes it.
    """

    shares: Sequence[_Share] = ()
    """Of the clients whose tokens pass at once, when it is not the one whose factors are bound."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the frozen layer and the update: (..., D_in) -> (..., D_out)."""
        out: Tensor = self.base_layer(x)
        if self.shares:
            return self._of_each(x, out)
        if self.disable_adapters:
            return out
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        return self._updated(out, self.lora_dropout["default"](x), a, b)

    def _updated(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Add B A x to what the frozen layer gave."""
        if is_widened(x):
            inner = F.linear(x.float(), a.float())
            wide = torch.addmm(
                out.flatten(0, -2).float(), inner.flatten(0, -2), b.float().t(), alpha=self.scaling["default"]
            )
            return wide.to(x.dtype).view_as(out)
        inner = F.linear(x, a.to(x.dtype))  # (..., R)
        update = b.to(x.dtype).t()
        flat = torch.addmm(out.flatten(0, -2), inner.flatten(0, -2), update, alpha=self.scaling["default"])
        return flat.view_as(out)

    def _of_each(self, x: Tensor, out: Tensor) -> Tensor:
        """Add to each client's tokens its own update: (1, N, D_in), (1, N, D_out) -> (1, N, D_out)."""
        sizes, dropout = [share.tokens for share in self.shares], self.lora_dropout["default"]
        updated = []
        for share, own, before in zip(self.shares, x.split(sizes, 1), out.split(sizes, 1), strict=True):
            if isinstance(dropout, SeededDropout):
                own = dropout.dropped(own, share.seed)
            updated.append(self._updated(before, own, share.a, share.b))
        return torch.cat(updated, 1)


class Slots(Protocol):
    """The places in a stage where a client's trained tensors are put; the frozen base is shared."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its name in an :data:`~pplr.backbones.adapters.AdapterState`."""

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
            absolute = f"{prefix}.{int(number) + blocks.first_layer}.{rest}{DIFFERENCE}"
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
        """Shape of every tensor by its name in an :data:`~pplr.backbones.adapters.AdapterState`."""
        return {name: tuple(module.weight.shape) for name, module in self._places()}

    def _places(self) -> Iterable[tuple[str, nn.Linear]]:
        for name, layer in self._layers.items():
            yield f"{PEFT_PREFIX}{name}.lora_A.weight", layer.lora_A["default"]
            yield f"{PEFT_PREFIX}{name}.lora_B.weight", layer.lora_B["default"]

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
                dropout.reseed(_own_seed(seed, name))

    @contextmanager
    def shared(self, tenants: Sequence[Tenant]) -> Iterator[None]:
        """Let several clients' tokens pass one after another in a row, each with its own tensors and masks."""
        for name, layer in self._layers.items():
            a, b = (f"{PEFT_PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
            layer.shares = [
                _Share(own.parameters[a], own.parameters[b], own.tokens, _own_seed(own.seed, name)) for own in tenants
            ]
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.shares = ()

    def run(self, blocks: Blocks, *inputs: Any) -> Tensor:
        """Run the blocks, whose layers hold what is bound."""
        return blocks(*inputs)


def _own_seed(seed: int | None, layer: str) -> int | None:
    return None if seed is None else derive_seed(seed, layer)


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
