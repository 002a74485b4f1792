"""The main job of somebody who installed the wheel without extras, on a tiny model, as commands and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """A command and what it must do.

    Args:
        arguments: Of `pplr`.
        code: How it ends.
        says: Words of what it prints.
    """

    arguments: tuple[str, ...]
    code: int
    says: str


def main_job(data: Path, model: Path) -> list[Step]:
    """List the steps: a configuration, training, recommending, measuring, and the cures of what an extra brings."""
    small = (
        "data.source=recbole",
        f"data.path={data}",
        "data.partition={by: column, column: region, min_users: 1}",
        f"backbone.model={model}",
        "backbone.keep_blocks=null",
        "cut={input_layers: 1, output_layers: 1}",
        "federation.clients=3",
        "federation.rounds=1",
        "evaluation.test_users=3",
        "evaluation.validation_users=1",
    )
    settings = tuple(part for own in small for part in ("--set", own))
    kit = ("--kit", "kit")
    federation = ("--out", "fed", "--name", "f", "--host", "localhost", "--address", "localhost:1")
    return [
        Step(("--version",), 0, "pplr "),
        Step(("init",), 0, "written: quickstart.yaml"),
        Step(("train", "quickstart.yaml", "--run-dir", "run", *settings), 0, "run folder: run"),
        Step(("recommend", "run", "--user", "u1", "--count", "3"), 0, "history of user u1"),
        Step(("recommend", "run", "--client", "0", "--history", "Elm; Yew"), 0, "title"),
        Step(("evaluate", "run"), 0, "ndcg@10"),
        Step(("compare", "run", "run", "--samples", "10"), 0, "ndcg@10"),
        Step(("doctor",), 0, "torch"),
        Step(("report", "run"), 1, "pip install 'pplr[plots]'"),
        Step(("enroll", "init", *federation), 1, "pip install 'pplr[network]'"),
        Step(("stage", "health", *kit), 1, "pip install 'pplr[network]'"),
        Step(("server", "--federation", "fed", "--state", "state"), 1, "pip install 'pplr[flower]'"),
        Step(("client", *kit, "--data", str(data), "--server", "localhost:1"), 1, "pip install 'pplr[flower]'"),
        Step(("recommend", "run", "--user", "u1", *kit), 1, "pip install 'pplr[network]'"),
    ]
