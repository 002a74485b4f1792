"""Finished runs and records, made small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.deployment import Deployment
from pplr.config import Config
from pplr.testing import tiny_decoder, tiny_tokenizer

TINY = (
    "backbone.name=item_vectors",
    "backbone.item_vectors.width=8",
    "training.samples=null",
    "federation.rounds=1",
    "evaluation.cutoffs=[10]",
    "evaluation.test_users=null",
    "evaluation.validation_users=null",
    "data.partition.min_users=1",
)


@pytest.fixture
def tiny_config(tmp_path: Path, small_config: Callable[..., Config], model_folder: Path) -> Path:
    """The configuration of a small run of item vectors, as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(small_config(*TINY, f"backbone.model={model_folder}").to_yaml(), encoding="utf-8")
    return path


@pytest.fixture
def small_place(tmp_path: Path, small_config: Callable[..., Config]) -> SimpleNamespace:
    """A deployment of a tiny model, cut as the demo is, and what makes its configuration as ``quickstart`` does."""
    folder = tmp_path / "tiny"
    tiny_decoder(layers=5, width=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    own = (f"backbone.model={folder}", "backbone.dtype=bfloat16", "cut.input_layers=2", "cut.output_layers=1")

    def quickstart(*overrides: str) -> Config:
        return small_config(*own, *overrides)

    return SimpleNamespace(quickstart=quickstart, place=Deployment(tmp_path / "place", quickstart().cut, str(folder)))


@pytest.fixture
def make_record() -> Callable[..., dict[str, Any]]:
    return _record


def _record(
    tested: dict[str, list[int]], hits: dict[int, tuple[float, float]], seconds: float = 60.0
) -> dict[str, Any]:
    """Make a record by hand, its figures worked out from the values of its users."""
    metrics = ("recall@10", "ndcg@10")

    def mean(users: list[int], place: int) -> float:
        return sum(hits.get(user, (0.0, 0.0))[place] for user in users) / len(users)

    everyone = [user for own in tested.values() for user in own]
    by_client = {
        name: {"users": len(own), **{metric: mean(own, place) for place, metric in enumerate(metrics)}}
        for name, own in tested.items()
    }
    spread = {}
    for metric in metrics:
        values = [own[metric] for own in by_client.values()]
        middle = sum(values) / len(values)
        spread[metric] = {
            "worst": min(values),
            "best": max(values),
            "std": (sum((value - middle) ** 2 for value in values) / len(values)) ** 0.5,
            "gap": max(values) - min(values),
        }
    return {
        "settings": {},
        "machine": {"processor": "a processor", "threads": 1},
        "holdout_sha256": "h",
        "rounds": [{"loss": [1.0]}] * 3,
        "seconds": {"total": seconds, "train": seconds, "evaluate": 0.0},
        "floors": {"popularity": {"recall@10": 0.1, "ndcg@10": 0.05}},
        "partition_sha256": "p",
        "overall": {metric: mean(everyone, place) for place, metric in enumerate(metrics)},
        "clients": by_client,
        "spread": spread,
        "tested": tested,
        "hits": {str(user): list(own) for user, own in hits.items()},
    }
