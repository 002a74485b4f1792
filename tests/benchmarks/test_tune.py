"""Trials of settings: the grid, which round counts, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.tune as tune
from benchmarks.tune import Trial, best_round, carry_out, read_grid
from benchmarks.tuning_tables import tuning_section
from pplr.config_files import load_config
from pplr.errors import ConfigError
from pplr.testing import refuses

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("grid", sorted((ROOT / "benchmarks" / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_trial_of_a_grid_is_a_configuration_of_its_own(grid: Path) -> None:
    trials = read_grid(grid)
    configs = [
        load_config(ROOT / "configs" / f"{grid.stem.split('_')[0]}_item_vectors.yaml", trial.overrides)
        for trial in trials
    ]
    assert len({config.to_yaml() for config in configs}) == len(trials)
    for config in configs:  # a cut leaves the server a block
        assert config.cut is not None
        kept = config.backbone.keep_blocks
        assert kept is None or config.cut.input_layers + config.cut.output_layers < kept


def test_what_is_no_grid_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    for content in ("- a", "a: b", "a: [1]", "a: ["):
        path.write_text(content)
        with refuses(ConfigError, "grid"):
            read_grid(path)
    with refuses(ConfigError, "cannot read"):
        read_grid(tmp_path / "missing.yaml")
    path.write_text("a: [run.seed=1]")
    with refuses(ConfigError, "--seeds"):
        read_grid(path)
    path.write_text("a: []")
    with refuses(ConfigError, "--seeds"):
        read_grid(path, ["run.seed=1"])


def test_common_settings_come_before_a_trials_own(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("a: []\nb: [x.y=2]\n")
    assert read_grid(path, ["x.y=1"]) == [Trial("a", ["x.y=1"]), Trial("b", ["x.y=1", "x.y=2"])]


def _round(*clients: tuple[int, float]) -> dict[str, Any]:
    rows = {str(n): {"samples": s, "validation": {"ndcg@10": v, "loss": v}} for n, (s, v) in enumerate(clients)}
    return {"clients": rows}


def test_a_round_counts_by_its_clients_samples() -> None:
    rounds = [_round((3, 0.2), (1, 0.2)), _round((3, 0.1), (1, 0.9)), _round((3, 0.3), (1, 0.1))]
    assert best_round(rounds, "ndcg@10") == (2, pytest.approx(0.3))
    assert best_round(rounds, "loss") == (1, pytest.approx(0.2))


def test_a_trial_tests_one_user_and_reads_validation_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(config: Path, overrides: list[str], folder: Path) -> None:
        assert overrides[-3:] == ["run.seed=2", "evaluation.test_users=1", "evaluation.floors=[]"]
        (folder / "rounds.jsonl").write_text(json.dumps(_round((1, 0.5))) + "\n")
        (folder / "metrics.json").write_text(json.dumps({"seconds": {"train": 60.0}, "overall": {"ndcg@10": 1.0}}))
        (folder / "provenance.json").write_text(json.dumps({"machine": {"threads": 1, "device": "GPU"}}))

    monkeypatch.setattr(tune, "finish", finish)
    found = carry_out(Path("c.yaml"), Trial("b", ["training.batch_size=8"]), 2, tmp_path, "ndcg@10")
    assert found == {
        "machine": {"threads": 1, "device": "GPU"},
        "best_round": 1,
        "rounds": 1,
        "ndcg@10": 0.5,
        "train_seconds": 60.0,
    }


def _told(**values: list[float]) -> dict[str, Any]:
    trials = {
        name: {
            "set": ["x.y=1", *([] if name == "a" else ["training.batch_size=8"])],
            "seeds": {
                str(seed): {
                    "machine": {"threads": 1 + seed, "device": "GPU"},
                    "best_round": 1 + seed,
                    "rounds": 3,
                    "ndcg@10": value,
                    "train_seconds": 60.0 * (1 + seed),
                }
                for seed, value in enumerate(own)
            },
        }
        for name, own in values.items()
    }
    return {"machine": {"processor": "CPU", "threads": 8}, "config": "c.yaml", "metric": "ndcg@10", "trials": trials}


def test_the_best_trial_comes_first() -> None:
    body = tuning_section("x", _told(a=[0.4], b=[0.5])).body
    assert body.index("| b | `training.batch_size=8` | 0.5000 | 1 of 3 | 1.0 |") < body.index("| a | as configured |")
    assert "`pplr train c.yaml --set x.y=1`, with seed 0; GPU beside CPU, 1 threads." in body


def test_several_seeds_are_averaged_and_each_is_told() -> None:
    body = tuning_section("x", _told(a=[0.4, 0.5], b=[0.3, 0.5])).body
    assert "| a | as configured | 0.4500 (0.4000, 0.5000) | 1 of 3, 2 of 3 | 1.5 |" in body
    assert body.index("| a |") < body.index("| b |")
    assert "with seeds 0, 1; GPU beside CPU, 1 threads; GPU beside CPU, 2 threads." in body
