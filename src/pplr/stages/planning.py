"""What a cut would cost a client, before anything is cut: bytes, share of the compute, bytes on the wire."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from pplr.backbones.base import Blocks
from pplr.backbones.bundles import ENCODERS, CheckpointReader, block_number
from pplr.backbones.causal_lm import FAMILIES, DecoderBlocks
from pplr.backbones.encoder_blocks import EncoderBlocks
from pplr.backbones.loading import DECODER, ENCODER, attention_of
from pplr.backbones.slots import inject_adapter
from pplr.config import AdapterConfig
from pplr.errors import BackboneError, CutError, UnsupportedModelError
from pplr.stages.cut import CutPlan

__all__ = ["CutCost", "ModelSizes", "Workload", "cut_cost", "fitting", "parse_bytes", "read_sizes", "usual_cuts"]


@dataclass(frozen=True)
class Workload:
    """What a client trains on at once.

    Args:
        samples: B, samples of a batch.
        tokens: T, tokens of a sample, without padding.
        targets: Answer tokens of a sample; the head runs on these alone.
    """

    samples: int = 16
    tokens: int = 200
    targets: int = 14


@dataclass(frozen=True)
class ModelSizes:
    """What a model's parts take, in the number format asked for.

    Args:
        total_layers: L.
        hidden_size: D.
        itemsize: Bytes of a number.
        ends_bytes: Embeddings, norm and head.
        block_bytes: Each block, L values.
        block_flops: Multiply-adds of one block for one token, times two, without attention's own products.
        head_flops: Those of the head; an encoder has none.
        vocabulary: V, where there is a head; else 0.
        adapter_numbers: LoRA numbers of one block.
        saved_bytes: What one block keeps for the backward pass, for each token; measured.
        seconds: Of one block and of the head, for each token forward and backward; ``None`` when not measured.
    """

    total_layers: int
    hidden_size: int
    itemsize: int
    ends_bytes: int
    block_bytes: tuple[int, ...]
    block_flops: int
    head_flops: int
    vocabulary: int
    adapter_numbers: int
    saved_bytes: float
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class CutCost:
    """What one cut costs the client.

    Args:
        plan: The cut.
        stored_bytes: Frozen tensors of its bundle.
        memory_bytes: These, its adapter with gradients and AdamW's moments, and what a batch keeps for the backward
            pass; without the process itself (Python and libraries).
        compute_share: Part of the model's training compute that the client does, in [0, 1].
        wire_bytes: Of one training sample, both ways, forward and backward; a quarter less where nothing is trained
            before the first cut.
        tokens_per_second: Of the client's own part; ``None`` when not measured.
    """

    plan: CutPlan
    stored_bytes: int
    memory_bytes: int
    compute_share: float
    wire_bytes: int
    tokens_per_second: float | None


def read_sizes(
    folder: Path, dtype: str, adapter: AdapterConfig, workload: Workload, *, measure_speed: bool = False
) -> ModelSizes:
    """Read a checkpoint's sizes without loading it, and measure one block of its shape with random numbers.

    Args:
        folder: An HF folder of a decoder of the Llama-like layout, or of an encoder of the BERT layout.
        dtype: The number format that it would be held in.
        adapter: LoRA's settings.
        workload: The batch that is measured.
        measure_speed: Whether to time a block and the head as well.

    Raises:
        BackboneError: The folder cannot be read.
        UnsupportedModelError: The model's family is not verified.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"cannot read the model {folder}: {' '.join(str(error).split())[:200]}",
            cure="Give a folder of an HF model.",
        ) from error
    families = (*FAMILIES, *ENCODERS)
    if config.model_type not in families:
        raise UnsupportedModelError(
            f"{folder} is of the family {config.model_type!r}, which is not verified",
            cure=f"Choose a model of one of these families: {', '.join(families)}.",
        )
    itemsize = getattr(torch, dtype).itemsize
    shapes = CheckpointReader(folder).shapes()
    by_block = [0] * config.num_hidden_layers
    ends, block_flops = 0, 0
    for name, shape in shapes.items():
        block = block_number(name, config.model_type)
        if block is None:
            ends += math.prod(shape) * itemsize
        elif block >= 0:
            by_block[block] += math.prod(shape) * itemsize
            block_flops += 2 * math.prod(shape) if block == 0 and len(shape) == 2 else 0
    vocabulary = 0 if config.model_type in ENCODERS else config.vocab_size
    saved, numbers, seconds = _measure(config, dtype, adapter, workload, measure_speed)
    return ModelSizes(
        total_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        itemsize=itemsize,
        ends_bytes=ends,
        block_bytes=tuple(by_block),
        block_flops=block_flops,
        head_flops=2 * config.hidden_size * vocabulary,
        vocabulary=vocabulary,
        adapter_numbers=numbers,
        saved_bytes=saved,
        seconds=seconds,
    )


def cut_cost(sizes: ModelSizes, plan: CutPlan, workload: Workload) -> CutCost:
    """Work out what one cut costs the client."""
    own = [*plan.input, *plan.output]
    stored = sizes.ends_bytes + sum(sizes.block_bytes[block] for block in own)
    batch_tokens = workload.samples * workload.tokens
    trained = 4 * 4 * sizes.adapter_numbers * len(own)  # float32: the adapter, its gradient, two moments
    kept = batch_tokens * sizes.saved_bytes * len(own)
    kept += workload.samples * workload.targets * sizes.vocabulary * (sizes.itemsize + 8)  # logits, and in float32
    head = workload.targets / workload.tokens  # the part of the tokens that the head runs on
    mine = len(own) * sizes.block_flops + head * sizes.head_flops
    whole = sizes.total_layers * sizes.block_flops + head * sizes.head_flops
    speed = None
    if sizes.seconds is not None:
        block, head_seconds = sizes.seconds
        taken = len(own) * block + head * head_seconds
        speed = 1 / taken if taken > 0 else None
    return CutCost(
        plan=plan,
        stored_bytes=stored,
        memory_bytes=int(stored + trained + kept),
        compute_share=mine / whole,
        wire_bytes=4 * workload.tokens * sizes.hidden_size * sizes.itemsize,
        tokens_per_second=speed,
    )


def usual_cuts(total_layers: int) -> list[CutPlan]:
    """List the cuts worth a look: m of 0, 1 and 2, and k of 0, 1, 2, 4, 8, ... up to what leaves the server a block."""
    plans: list[CutPlan] = []
    for m in (0, 1, 2):
        for k in (0, *(2**power for power in range(total_layers.bit_length()))):
            try:
                plans.append(CutPlan(k, m, total_layers))
            except CutError:
                continue
    return [plan for plan in plans if not plan.is_whole]


def _measure(
    config: Any, dtype: str, adapter: AdapterConfig, workload: Workload, measure_speed: bool
) -> tuple[float, int, tuple[float, float] | None]:
    """Run one random block: bytes kept for each token, LoRA numbers, and seconds for each token."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    if getattr(one, "layer_types", None) is not None:
        one.layer_types = list(config.layer_types[:1])
    vocabulary, one.vocab_size = config.vocab_size, 8
    is_encoder = config.model_type in ENCODERS
    if getattr(one, "attention_window", None) is not None and not isinstance(one.attention_window, int):
        one.attention_window = list(config.attention_window[:1])
    one.bos_token_id = one.eos_token_id = None
    one.pad_token_id = 0 if is_encoder else None
    number_format = getattr(torch, dtype)
    kind = ENCODER if is_encoder else DECODER
    model = kind.auto.from_config(one, dtype=number_format, attn_implementation=attention_of(one), **kind.options)
    blocks: Blocks = EncoderBlocks(model, one, range(1)) if is_encoder else DecoderBlocks(model.model, one, range(1))
    if is_encoder and not set(adapter.target_modules) & {"query", "key", "value", "dense"}:
        adapter = adapter.model_copy(update={"target_modules": ("query", "value")})  # q_proj and v_proj of an encoder
    slots = inject_adapter(blocks.layers, adapter, first_layer=0)
    slots.reseed(0)
    states = torch.randn(workload.samples, workload.tokens, config.hidden_size).to(number_format).requires_grad_()
    tokens = workload.samples * workload.tokens
    frozen = {tensor.untyped_storage().data_ptr() for tensor in blocks.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        leaving = blocks(states)
    numbers = sum(math.prod(shape) for shape in slots.shapes.values())
    if not measure_speed:
        return sum(kept.values()) / tokens, numbers, None
    leaving.sum().backward()
    block_seconds = min(_timed(lambda: blocks(states).sum().backward()) for _ in range(3)) / tokens
    if is_encoder:
        return sum(kept.values()) / tokens, numbers, (block_seconds, 0.0)
    head = torch.randn(config.hidden_size, vocabulary).to(number_format)
    few = states.detach().reshape(-1, config.hidden_size)[: workload.samples * workload.targets].requires_grad_()
    head_seconds = min(_timed(lambda: (few @ head).float().logsumexp(-1).sum().backward()) for _ in range(3))
    return sum(kept.values()) / tokens, numbers, (block_seconds, head_seconds / len(few))


def _timed(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def parse_bytes(text: str) -> int:
    """Read a size such as ``2GB``, ``500 MB`` or ``1GiB``.

    Raises:
        CutError: It is not one.

    Example:
        >>> parse_bytes("2GB"), parse_bytes("1 KiB")
        (2000000000, 1024)
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BIKMGTbikmgt").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not math.isfinite(size) or size <= 0:
        raise CutError(f"{text!r} is not a size", cure="Write a number and a unit, such as 2GB, 500MB or 1GiB.")
    return int(size)


def fitting(costs: Sequence[CutCost], memory: int | None, storage: int | None) -> list[bool]:
    """Say of each cut whether it keeps within the budgets; one that is not given does not bind."""
    return [
        (memory is None or cost.memory_bytes <= memory) and (storage is None or cost.stored_bytes <= storage)
        for cost in costs
    ]
