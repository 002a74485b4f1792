"""What is measured: every benchmark in its order, and the rows that a summary must have, measured or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BENCHMARKS", "REQUIRED", "Required", "missing"]

BENCHMARKS = (
    "training",
    "packed",
    "shared_prefix",
    "federated_round",
    "roofline",
    "clients",
    "bfloat16",
    "attention",
    "epoch",
    "network",
    "overlap",
    "network_memory",
    "wire",
    "aggregation",
    "round_overhead",
    "shared_cores",
    "sasrec_speed",
    "evaluating",
    "recommending",
    "equal_time",
    "profiles",
)


@dataclass(frozen=True)
class Required:
    """A row that a summary must have.

    Args:
        benchmark: Measures it.
        name: What it is called where it was not measured.
        against: What it is measured against.
        at_least: Its bound; none where only the ratio is told.
        words: Are in the name of a row that is it.
    """

    benchmark: str
    name: str
    against: str
    at_least: float | None
    words: str

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Say whether a measured row is this one: it has its words and its bound, and not a part was measured alone."""
        bound, name = row["at_least"], row["name"]
        same = bound is self.at_least is None or (
            bound is not None and self.at_least is not None and math.isclose(bound, self.at_least)
        )
        return same and self.words in name and "extrapolated" not in name

    @property
    def row(self) -> dict[str, Any]:
        """The row of what was not measured."""
        return {
            "name": self.name,
            "against": self.against,
            "ratio": None,
            "at_least": self.at_least,
            "at_most": None,
            "met": None,
        }


REQUIRED = (
    Required(
        "federated_round",
        "a federated round of five clients, SmolLM2-135M, same samples, same loss",
        "HF Trainer + PEFT, the base loaded for each client, padded, logits everywhere",
        3.0,
        "a federated round of five clients",
    ),
    Required(
        "packed",
        "supervised targets per second, packed",
        "one target for each prompt",
        10.0,
        "supervised targets per second",
    ),
    Required(
        "equal_time",
        "validation NDCG@10 after equal wall-clock time, item vectors",
        "one target for each prompt",
        3.0,
        "validation NDCG@10 after equal wall-clock time",
    ),
    Required(
        "sasrec_speed",
        "item vectors, targets a second, whole training step",
        "SASRec of a kept library on the same data",
        None,
        "item vectors, targets a second, whole training step",
    ),
    Required(
        "evaluating",
        "evaluating 200 users, users per second",
        "one user at a time: beam 4, 128 new tokens, then grounding",
        10.0,
        "200 users",
    ),
    Required(
        "overlap",
        "training across the cut with overlap, TLS loopback",
        "the uncut model",
        0.95,
        "training across the cut with overlap, TLS loopback",
    ),
    Required(
        "overlap",
        "five clients on one server, cross-client batches",
        "one client at a time",
        1.3,
        "clients on one server, cross-client batches",
    ),
    Required(
        "aggregation",
        "aggregation, 1,000 clients",
        "the formula in plain loops",
        50.0,
        "aggregation, 1,000 clients",
    ),
    Required(
        "roofline",
        "share of the machine's measured matmul rate in training, bfloat16",
        "a product of two square matrices",
        0.6,
        "share of the machine's measured matmul rate in training, bfloat16",
    ),
    Required(
        "gpu",
        "a round of LLaMA-7B, 1,024 samples, five epochs, one GPU",
        "the authors' 16 minutes on four GPUs",
        16 / 3,
        "a round of LLaMA-7B, 1,024 samples, five epochs, one GPU",
    ),
)
"""What speed is held to, a row each."""


def missing(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List the rows that a benchmark owes, made of what is known of them without measuring."""
    owed = (own for own in REQUIRED if own.benchmark == benchmark)
    return [own.row for own in owed if not any(own.matches(row) for row in rows)]
