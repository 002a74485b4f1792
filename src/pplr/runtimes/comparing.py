"""Runs beside each other: whether a difference between two is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pplr.errors import ConfigError, RunError, nearest

if TYPE_CHECKING:
    from pplr.recommend.evaluation import Evaluation
    from pplr.runtimes.run import Run

__all__ = [
    "Difference",
    "check_same_holdout",
    "chosen_metrics",
    "compare",
    "difference_of",
    "finished_metrics",
    "metric_names",
]


@dataclass(frozen=True)
class Difference:
    """How far a run is from the first one in one metric, over the users that both tested.

    Args:
        run: The run's folder.
        metric: Such as ``ndcg@10``.
        users: How many users both tested.
        difference: Mean of this run minus the first.
        low: 2.5 % quantile of the resampled difference.
        high: 97.5 % quantile.
        p: Two-sided p of the paired bootstrap.
    """

    run: str
    metric: str
    users: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def is_one(self) -> bool:
        """Whether the interval leaves out 0, so that it can be called a difference."""
        return self.low > 0 or self.high < 0


def compare(
    runs: Sequence[Run], metrics: Sequence[str] = (), *, samples: int = 10_000, seed: int = 0
) -> list[Difference]:
    """Compare every run with the first one by a paired bootstrap over users.

    Args:
        runs: At least one, finished.
        metrics: Which to compare; recall and ndcg at the first run's smallest cutoff when empty.
        samples: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        RunError: A run is not finished, or was tested on other data or another holdout than the first.
        ConfigError: A metric was not measured.
    """
    first, *others = runs
    chosen = chosen_metrics(first, metrics)
    differences: list[Difference] = []
    for other in others:
        finished_metrics(other)
        check_same_holdout(first, other)
        a, b = other.evaluation(), first.evaluation()
        differences += [difference_of(str(other.folder), a, b, metric, samples=samples, seed=seed) for metric in chosen]
    return differences


def difference_of(
    name: str, a: Evaluation, b: Evaluation, metric: str, *, samples: int = 10_000, seed: int = 0
) -> Difference:
    """Tell how far one evaluation is above another, by a paired bootstrap over the users that both tested.

    Args:
        name: Of what is compared.
        a: This,
        b: less this.
        metric: Which both measured.
        samples: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        ConfigError: The metric was not measured in both.
        DataError: The two share no user.
    """
    from pplr.recommend.evaluation import paired_bootstrap

    users = len(set(a.users.tolist()) & set(b.users.tolist()))
    return Difference(name, metric, users, *paired_bootstrap(a, b, metric, samples=samples, seed=seed))


def chosen_metrics(run: Run, metrics: Sequence[str]) -> list[str]:
    """Check metrics asked for, or choose recall and ndcg at the smallest cutoff.

    Raises:
        ConfigError: A metric was not measured.
    """
    known = metric_names(finished_metrics(run))
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"{run.folder} did not measure {metric!r}", cure=nearest(metric, known))
    chosen: list[str] = list(metrics)
    for kind in ("recall@", "ndcg@") if not metrics else ():
        cutoffs = [int(name.removeprefix(kind)) for name in known if name.startswith(kind)]
        chosen += [f"{kind}{min(cutoffs)}"] if cutoffs else []
    return chosen


def finished_metrics(run: Run) -> Mapping[str, Any]:
    """Return the run's metrics.

    Raises:
        RunError: The run has none yet.
    """
    if run.metrics is None:
        raise RunError(
            f"{run.folder} has no metrics yet, its training is not finished",
            cure=f"Go on with `pplr train {run.folder / 'config.yaml'} --run-dir {run.folder} --resume`.",
        )
    return run.metrics


def metric_names(metrics: Mapping[str, Any]) -> list[str]:
    """Name the metrics of a run in their order."""
    groups = [metrics.get("overall") or {}, *(metrics.get("clients") or {}).values()]
    return [name for name in dict.fromkeys(name for group in groups for name in group) if name != "users"]


def check_same_holdout(first: Run, other: Run) -> None:
    """Refuse to pair users of different data: their numbers would mean different people.

    Raises:
        RunError: The holdouts differ.
    """
    for key in sorted(set(first.provenance) & set(other.provenance)):
        if "holdout" in key and first.provenance[key] != other.provenance[key]:
            raise RunError(
                f"{other.folder} was tested on another holdout than {first.folder}",
                cure="Compare runs with the same data section.",
            )
