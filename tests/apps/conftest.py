from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pplr.config import Config


def _metrics(method: str = "pplr", clients: int = 2) -> dict[str, Any]:
    names = ("recall@10", "ndcg@10", "recall@20", "ndcg@20", "mrr")
    return {
        "method": method,
        "backbone": "causal_lm",
        "cut": {"input_layers": 2, "output_layers": 1, "total_layers": 30},
        "overall": {name: 0.11 + place / 100 for place, name in enumerate(names)},
        "clients": {
            str(client): {"users": 190 + client, **dict.fromkeys(names, 0.25 + client / 100)}
            for client in range(clients)
        },
        "spread": {"ndcg@10": {"worst": 0.0301, "best": 0.0702, "std": 0.0103, "gap": 0.0404}},
        "floors": {"popularity": {"recall@10": 0.0505, "ndcg@10": 0.0206}},
        "cost": {
            "client": {"stored_bytes": 412_345_678, "peak_rss_bytes": None, "train_flops": 3.4e12},
            "server": {"stored_bytes": 1_212_345_678, "peak_rss_bytes": None, "train_flops": None},
            "wire": {"bytes_up": 12_300_000, "bytes_down": None},
        },
        "seconds": {"total": 3700.0, "train": 3000.0, "evaluate": None},
        "samples_per_second": 2.34,
    }


@pytest.fixture
def metrics() -> Callable[..., dict[str, Any]]:
    return _metrics


@pytest.fixture
def evaluation() -> Callable[..., Any]:
    def make(values: Any, users: Any = None, metric: str = "ndcg@10") -> Any:
        from pplr.recommend.evaluation import Evaluation

        values = np.asarray(values, dtype=np.float64)
        users = np.arange(len(values)) if users is None else np.asarray(users)
        return Evaluation(users, tuple("0" for _ in values), {metric: values, "recall@10": values})

    return make


@pytest.fixture
def fake_run(evaluation: Callable[..., Any]) -> Callable[..., Any]:
    """Make something with the surface of a run."""

    def make(folder: str = "runs/a", **parts: Any) -> Any:
        found = parts.pop("tested", None) or evaluation([0.0, 0.5, 1.0])
        defaults: dict[str, Any] = {
            "folder": Path(folder),
            "config": Config(),
            "metrics": _metrics(),
            "rounds": [],
            "provenance": {"holdout_sha256": "aa"},
            "evaluation": lambda part="test": found,
            "close": lambda: None,
        }
        return SimpleNamespace(**(defaults | parts))

    return make


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for the runtimes, which load torch: set ``train`` and ``open_run``."""
    launch, run = ModuleType("pplr.runtimes.launch"), ModuleType("pplr.runtimes.run")
    fakes = SimpleNamespace(train=None, open_run=None, servers=[])
    launch.train = lambda *args, **options: fakes.train(*args, **options)  # type: ignore[attr-defined]
    run.open_run = lambda folder, server=None: (fakes.servers.append(server), fakes.open_run(folder))[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, launch.__name__, launch)
    monkeypatch.setitem(sys.modules, run.__name__, run)
    return fakes


@pytest.fixture
def round_record() -> dict[str, Any]:
    line = """{"server_round": 1, "similarity": [[1.0, 0.7], [0.8, 1.0]],
        "clients": {"0": {"samples": 120, "loss": 2.1, "loss_share": 0.4, "heating_weight": 0.8,
            "mixed_from": {"0": 0.6, "1": 0.4}, "validation": {"ndcg@10": 0.05}, "seconds": 12.0, "bytes_up": 0,
            "bytes_down": 0}, "1": {"samples": 64, "loss": null, "validation": {"loss": 3.25}}}}"""
    return dict(json.loads(line))
