"""Samples per second of one client's training, against the usual loop on the same batch of real prompts.

The usual loop is HF's own Trainer with a PEFT model: float32, padded, logits at every position. The two take turns,
one optimizer step each, so that both meet the same machine.

    python -m benchmarks.training
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.measuring import causal_lm_of, quickstart, real_batch, spread, use_all_cores, write_result
from benchmarks.reference.usual_loop import PaddedSamples, collate_padded, usual_model
from pplr.config import CutConfig
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel


class _TakeTurns(TrainerCallback):
    """Times each of the Trainer's steps, and lets the others take one after it."""

    def __init__(self, others: dict[str, Any], warmup: int) -> None:
        self.seconds: dict[str, list[float]] = {"usual": []} | {name: [] for name in others}
        self._others, self._warmup, self._started = others, warmup, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        usual = time.perf_counter() - self._started
        taken = {"usual": usual}
        for name, step in self._others.items():
            started = time.perf_counter()
            step()
            taken[name] = time.perf_counter() - started
        if state.global_step > self._warmup:
            for name, seconds in taken.items():
                self.seconds[name].append(seconds)
            print("  ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items()))


def _one_step(client: ClientModel, batch: Any) -> None:
    (client.train_loss(batch, 1) / batch.targets).backward()
    client.optimizer_step(1.0)


def main() -> None:
    """Measure and write ``training.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7)
    arguments = parser.parse_args()
    use_all_cores()
    config = quickstart()
    backbone = causal_lm_of(config)
    encoded = real_batch(config, backbone, arguments.batch_size)
    batch = backbone.collate(encoded)
    steps = {}
    for name, cut in (("uncut", None), ("cut", CutConfig(input_layers=2, output_layers=1))):
        model = CutModel(backbone, CutPlan.make(cut, backbone.total_layers), config.adapter, config.training)
        client = model.client(name, model.initial_adapter(0))
        client.begin_round(1000)
        steps[name] = lambda client=client: _one_step(client, batch)

    source = AutoModelForCausalLM.from_pretrained(backbone.folder, dtype=torch.float32, attn_implementation="sdpa")
    turns = _TakeTurns(steps, warmup=2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=usual_model(source, config.adapter),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps + 2,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=config.training.learning_rate,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=PaddedSamples(encoded),
            data_collator=lambda rows: collate_padded(rows, backbone.pad_token),
            callbacks=[turns],
        )
        trainer.train()
    told = {name: spread([arguments.batch_size / s for s in seconds]) for name, seconds in turns.seconds.items()}
    for name, rate in told.items():
        print(f"{name}: {rate['median']:.2f} samples/s ({rate['lowest']:.2f} to {rate['highest']:.2f})")
    ratio = told["cut"]["median"] / told["usual"]["median"]
    uncut = told["cut"]["median"] / told["uncut"]["median"]
    print(f"cut against the usual loop: {ratio:.2f}; cut against uncut: {uncut:.2f}")
    write_result(
        "training",
        {
            "batch": {"samples": batch.samples, "tokens": batch.tokens, "targets": batch.targets},
            "samples_per_second": told,
            "rows": [
                {
                    "name": "training, samples per second, cut 2 + 1 of 30",
                    "against": "HF Trainer, float32, padded, logits everywhere",
                    "ratio": ratio,
                    "at_least": 1.7,
                    "met": ratio >= 1.7,
                }
            ],
        },
    )


if __name__ == "__main__":
    main()
