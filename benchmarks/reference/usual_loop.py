"""The usual way to fine-tune: a PEFT model, padded batches, labels of -100 before the answer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset

from pplr.backbones.causal_lm import EncodedSample
from pplr.config import AdapterConfig


def usual_model(model: Any, config: AdapterConfig) -> Any:
    """Wrap a model by PEFT."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, lora)


class PaddedSamples(Dataset[dict[str, list[int]]]):
    """Encoded samples as the Trainer takes them."""

    def __init__(self, encoded: Sequence[EncodedSample]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sample = self._encoded[index]
        return {
            "input_ids": [*sample.prompt, *sample.answer],
            "labels": [-100] * len(sample.prompt) + list(sample.answer),
        }


def collate_padded(rows: Sequence[dict[str, list[int]]], pad_token: int) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", pad_token), "labels": padded("labels", -100), "attention_mask": mask}
