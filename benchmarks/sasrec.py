"""SASRec, an id-based sequential model, beside the floors, on a configuration's own holdout.

RecTools trains it, in an environment of its own (``.venv-rectools``), since it wants an older numpy. pplr's evaluation
measures it, as it measures everything else. What comes out goes to ``results/``.

    python -m benchmarks.sasrec configs/movielens_item_vectors.yaml --name sasrec-movielens-100k
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import quality_parser, write_quality
from pplr.config_files import load_config
from pplr.data.holdout import Holdout
from pplr.data.prompts import Case
from pplr.errors import ConfigError, PplrError
from pplr.recommend.evaluation import evaluate
from pplr.recommend.floors import fit_floor
from pplr.runtimes.run_data import RunData, load_run_data

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-rectools"
REQUIREMENTS = ("rectools[torch]==0.19.0",)
WIDTHS, DROPOUTS, LENGTHS = (64, 128), (0.2, 0.5), (50, 200)


class Scored:
    """Ranks by scores that were computed elsewhere.

    Args:
        table: (U, N), a row for each user.
        users: The user of each row.
    """

    def __init__(self, table: NDArray[np.float32], users: Sequence[int]) -> None:
        self._table = table
        self._rows = {user: row for row, user in enumerate(users)}

    def scores(self, cases: Sequence[Case]) -> NDArray[np.float32]:
        """Look up: (B, N)."""
        return self._table[[self._rows[case.user] for case in cases]]


def environment() -> str:
    """Make the environment if it is missing; return its python."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "made").exists():
        print(f"making {ENVIRONMENT.name} with {', '.join(REQUIREMENTS)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        torch = f"torch=={version('torch').split('+')[0]}"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", torch, *REQUIREMENTS], check=True)
        (ENVIRONMENT / "made").touch()
    return str(python)


def add_arguments(
    parser: argparse.ArgumentParser,
    widths: Sequence[int] = WIDTHS,
    dropouts: Sequence[float] = DROPOUTS,
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Add how SASRec is trained, and which settings are tried."""
    parser.add_argument("--check-every", type=int, default=5, help="epochs between two looks at validation")
    parser.add_argument("--patience", type=int, default=3, help="looks without a better one")
    parser.add_argument("--most-epochs", type=int, default=150)
    parser.add_argument("--widths", nargs="+", type=int, default=widths)
    parser.add_argument("--dropouts", nargs="+", type=float, default=dropouts)
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths)
    parser.add_argument("--loss", choices=["softmax", "gBCE", "sampled_softmax"], default="softmax")
    parser.add_argument("--negatives", type=int, help="sampled items of gBCE and sampled_softmax")
    parser.add_argument("--train-batch", type=int, default=32, help="users of a batch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--keep", type=Path, help="a folder; the same command again goes on from what it holds")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at once, which share the cores")


def histories_of(holdout: Holdout, cases: Sequence[Case]) -> dict[int, list[int]]:
    """Tell what each tested user took before, each item once, in order of time."""
    return {case.user: list(dict.fromkeys(holdout.history(case.user, "test").tolist())) for case in cases}


def cases_of(parts: Mapping[str, Sequence[Case]]) -> list[Case]:
    """Put the cases of all clients together."""
    return [case for own in parts.values() for case in own]


def task(data: RunData, seeds: Sequence[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Write down what SASRec trains on, whose validation it looks at, and which settings it tries.

    Raises:
        ConfigError: Sampled negatives and the loss do not go together.
    """
    if (arguments.loss == "softmax") != (arguments.negatives is None):
        raise ConfigError(
            f"--loss {arguments.loss} with --negatives {arguments.negatives}",
            cure="Give --negatives with gBCE or sampled_softmax, and with them alone.",
        )
    sampled = {} if arguments.negatives is None else {"n_negatives": arguments.negatives}
    looked_at = {case.user for case in cases_of(data.validation)}
    return {
        "items": len(data.dataset.catalog),
        "train": [own.tolist() for own in data.holdout.train],
        "validation": [
            int(own[0]) if len(own) and user in looked_at else None for user, own in enumerate(data.holdout.validation)
        ],
        "test_histories": histories_of(data.holdout, cases_of(data.test)),
        "settings": [
            {
                "n_factors": w,
                "dropout_rate": d,
                "session_max_len": n,
                "n_blocks": 2,
                "n_heads": 2,
                "loss": arguments.loss,
                **sampled,
                "batch_size": arguments.train_batch,
            }
            for w, d, n in itertools.product(arguments.widths, arguments.dropouts, arguments.lengths)
        ],
        "seeds": list(seeds),
        "check_every": arguments.check_every,
        "patience": arguments.patience,
        "most_epochs": arguments.most_epochs,
        "device": arguments.device,
        "parallel": arguments.parallel,
        "keep": None if arguments.keep is None else str(arguments.keep.absolute()),
        "threads": max(1, len(os.sched_getaffinity(0)) // arguments.parallel),
    }


def fit_sasrec(
    data: RunData, seeds: Sequence[int], arguments: argparse.Namespace
) -> tuple[dict[int, Scored], dict[str, Any]]:
    """Train SASRec with some seeds, the settings chosen by validation with the first.

    Args:
        data: Train and validation are read; the test cases are scored.
        seeds: Seeds.
        arguments: Those of :func:`add_arguments`.

    Returns:
        A ranker for each seed, and what was tried and chosen.

    Raises:
        ConfigError: Sampled negatives and the loss do not go together.
    """
    told = task(data, seeds, arguments)
    python = environment()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "histories.json", Path(folder) / "scores.npz"
        source.write_text(json.dumps(told), encoding="utf-8")
        command = [python, str(Path(__file__).with_name("rectools_sasrec.py")), str(source), str(out)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
        with np.load(out) as tables:
            users = list(told["test_histories"])
            return {seed: Scored(tables[f"seed_{seed}"], users) for seed in seeds}, json.loads(str(tables["summary"]))


def main() -> None:
    """Train, measure and write ``results/NAME.json``."""
    parser = quality_parser(__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    data = load_run_data(config)
    items = len(data.dataset.catalog)
    try:
        rankers, summary = fit_sasrec(data, arguments.seeds, arguments)
    except PplrError as error:
        sys.exit(f"error: {error}")
    measured: dict[str, Any] = {f"sasrec, seed {seed}": own for seed, own in rankers.items()}
    for name in config.evaluation.floors:
        measured[name] = fit_floor(name, data.holdout, items, config.run.seed)
    evaluations = {
        name: evaluate(ranker, data.test, config.evaluation.cutoffs, config.evaluation.batch_size)
        for name, ranker in measured.items()
    }
    result = {
        "config": str(arguments.config),
        "set": arguments.overrides,
        "holdout_sha256": data.holdout.sha256,
        "users": len(cases_of(data.test)),
        "requirements": REQUIREMENTS,
        "sasrec": summary,
        "overall": {name: own.overall() for name, own in evaluations.items()},
    }
    write_quality(arguments.name, result)
    for name, own in evaluations.items():
        figures = ", ".join(f"{key} {value:.4f}" for key, value in own.overall().items() if value is not None)
        print(f"{name}: {figures}")


if __name__ == "__main__":
    main()
