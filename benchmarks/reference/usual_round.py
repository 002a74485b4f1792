"""The usual way to carry out a federated round: every client trains by HF's Trainer on a base loaded for it alone.

Padded to the longest of a batch, logits at every position; then adapters are averaged by loops.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from benchmarks.reference.usual_loop import PaddedSamples, collate_padded, usual_model
from pplr.backbones.adapters import AdapterState
from pplr.backbones.causal_lm import EncodedSample
from pplr.config import AdapterConfig, TrainingConfig

__all__ = ["Usual", "train_usually"]


@dataclass(frozen=True)
class Usual:
    """What a client's training gave.

    Args:
        adapter: Its LoRA tensors.
        loss: Mean loss per answer token, in nats.
        load_seconds: What went into the base, its adapter and the Trainer before the first step.
    """

    adapter: AdapterState
    loss: float
    load_seconds: float


class _Trainer(Trainer):
    """HF's Trainer, which also adds up the loss over answer tokens, and may take samples as they lie."""

    in_order = False
    total, targets = 0.0, 0
    first_step = 0.0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int] | None:
        return SequentialSampler(self.train_dataset) if self.in_order else super()._get_train_sampler(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.first_step = self.first_step or time.perf_counter()
        wanted = int((inputs["labels"][:, 1:] != -100).sum())
        told = super().compute_loss(model, inputs, *args, **kwargs)
        self.total += float((told[0] if isinstance(told, tuple) else told).detach()) * wanted
        self.targets += wanted
        return told


def train_usually(
    folder: str | Path,
    encoded: Sequence[EncodedSample],
    initial: AdapterState,
    adapter: AdapterConfig,
    training: TrainingConfig,
    *,
    pad_token: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    in_order: bool = False,
) -> Usual:
    """Load the base, wrap it by PEFT, train a client's adapter, and let the base go.

    Args:
        folder: The base, a folder or a hub id.
        encoded: The client's samples.
        initial: The adapter to start from.
        adapter: LoRA's settings.
        training: Batches, epochs, rate.
        pad_token: What rows are filled with.
        dtype: Of the base. With bfloat16 the Trainer is told ``bf16=True``, and PEFT keeps the adapter in float32.
        in_order: Take the samples as they lie, rather than shuffled.
    """
    started = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = usual_model(base, adapter)
    set_peft_model_state_dict(model, dict(initial))
    steps = training.local_epochs * -(-len(encoded) // training.batch_size)
    with tempfile.TemporaryDirectory() as output:
        trainer = _Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=output,
                max_steps=steps,
                per_device_train_batch_size=training.batch_size,
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                warmup_steps=min(training.warmup_steps, steps // 2),
                max_grad_norm=training.clip_norm or 0.0,
                use_cpu=True,
                bf16=dtype == "bfloat16",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=PaddedSamples(encoded),
            data_collator=lambda rows: collate_padded(rows, pad_token),
        )
        trainer.in_order = in_order
        trainer.train()
    state = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    return Usual(state, trainer.total / trainer.targets, trainer.first_step - started)
