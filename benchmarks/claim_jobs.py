"""What the test of the paper's claim compares: methods, on holdouts, partitions and seeds."""

from __future__ import annotations

from dataclasses import dataclass

HOLDOUTS = ("leave_one_out", "global_time")
PARTITIONS: dict[str, tuple[str, ...]] = {
    "kmeans": ("data.partition.by=kmeans",),
    "occupation": ("data.partition.by=column", "data.partition.column=occupation"),
    "each-occupation": ("data.partition.by=column", "data.partition.column=occupation", "federation.clients=21"),
}
METHODS: dict[str, tuple[str, ...]] = {
    "local": ("federation.method=local",),
    "centralized": ("federation.method=centralized",),
    "fedavg": ("federation.method=fedavg",),
    "fedprox": ("federation.method=fedprox",),
    "ditto": ("federation.method=ditto",),
    "pplr": ("federation.method=pplr",),
    "pplr-no-heating": ("federation.method=pplr", "federation.heating_scale=null"),
    "pplr-no-similarity": ("federation.method=pplr", "federation.similarity=none"),
    "pplr-updates": ("federation.method=pplr", "federation.similarity=updates"),
    "pplr-products": ("federation.method=pplr", "federation.similarity=products"),
    "pplr_weighted": ("federation.method=pplr_weighted",),
}
"""Each row of a table, as settings."""


@dataclass(frozen=True)
class Job:
    """One run that is wanted.

    Args:
        holdout: A kind of holdout.
        partition: A key of ``PARTITIONS``.
        seed: The run's seed.
        method: A key of ``METHODS``.
    """

    holdout: str
    partition: str
    seed: int
    method: str

    @property
    def name(self) -> str:
        """Name the job's files."""
        return f"{self.holdout}-{self.partition}-{self.seed}-{self.method}"

    @property
    def overrides(self) -> list[str]:
        """Tell the settings that are this job's."""
        kind = f"data.holdout.kind={self.holdout}"
        return [kind, *PARTITIONS[self.partition], *METHODS[self.method], f"run.seed={self.seed}"]
